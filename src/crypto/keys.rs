//! The service's secret, and the keys that are derived from it.

use aws_lc_rs::{constant_time::verify_slices_are_equal, hkdf, hmac};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};

/// The least length of a secret, in bytes: that of the hash of HS256 (RFC 7518,
/// section 3.2).
pub const MIN_SECRET_BYTES: usize = 32;

/// A secret of at least [`MIN_SECRET_BYTES`].
#[derive(Clone, Debug)]
pub struct SigningKey(SecretString);

impl SigningKey {
    /// `None` if the secret is too short.
    #[must_use]
    pub fn new(secret: SecretString) -> Option<Self> {
        (secret.expose_secret().len() >= MIN_SECRET_BYTES).then_some(Self(secret))
    }

    /// The secret as it is, to sign access tokens with.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.expose_secret().as_bytes()
    }

    /// Names the key without telling it: what a token's `kid` says.
    #[must_use]
    pub fn key_id(&self) -> String {
        let tag = hmac::sign(&self.derive("key id"), b"");
        URL_SAFE_NO_PAD.encode(&tag.as_ref()[..8])
    }

    /// HKDF (RFC 5869) without a salt: the secret is random already.
    fn derive(&self, purpose: &'static str) -> hmac::Key {
        hkdf::Salt::new(hkdf::HKDF_SHA256, &[])
            .extract(self.as_bytes())
            .expand(&[b"fast-zero ", purpose.as_bytes()], hmac::HMAC_SHA256)
            .expect("a key of the length of one hash can always be derived")
            .into()
    }
}

/// The key that signs, and the one before it, which still verifies.
#[derive(Clone, Debug)]
pub struct Keyring {
    /// Signs.
    pub current: SigningKey,
    /// Verifies as well as the current one.
    pub previous: Option<SigningKey>,
}

impl Keyring {
    /// Both keys.
    #[must_use]
    pub const fn new(current: SigningKey, previous: Option<SigningKey>) -> Self {
        Self { current, previous }
    }

    /// All keys that verify.
    pub fn verification_keys(&self) -> impl Iterator<Item = &SigningKey> {
        std::iter::once(&self.current).chain(&self.previous)
    }

    /// Keys for one purpose, from which the secrets and the keys for other purposes
    /// cannot be told.
    #[must_use]
    pub fn derive(&self, purpose: &'static str) -> MacKeys {
        MacKeys {
            current: self.current.derive(purpose),
            previous: self.previous.as_ref().map(|key| key.derive(purpose)),
        }
    }
}

/// Keys for message authentication codes (HMAC-SHA256): the current one makes them,
/// the previous one still verifies.
#[derive(Clone, Debug)]
pub struct MacKeys {
    current: hmac::Key,
    previous: Option<hmac::Key>,
}

/// The length of a message authentication code, in bytes.
pub const MAC_BYTES: usize = 32;

impl MacKeys {
    /// Authenticates the parts, in this order.
    #[must_use]
    pub fn sign(&self, parts: &[&[u8]]) -> [u8; MAC_BYTES] {
        let mut mac = [0; MAC_BYTES];
        mac.copy_from_slice(tag(&self.current, parts).as_ref());
        mac
    }

    /// Whether one of the keys made `mac` of the parts; in constant time.
    #[must_use]
    pub fn verify(&self, parts: &[&[u8]], mac: &[u8]) -> bool {
        std::iter::once(&self.current)
            .chain(&self.previous)
            .any(|key| verify_slices_are_equal(tag(key, parts).as_ref(), mac).is_ok())
    }
}

/// Each part is preceded by its length, so that no two lists of parts are alike.
fn tag(key: &hmac::Key, parts: &[&[u8]]) -> hmac::Tag {
    let mut context = hmac::Context::with_key(key);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    context.sign()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: char) -> SigningKey {
        SigningKey::new(byte.to_string().repeat(MIN_SECRET_BYTES).into()).expect("long enough")
    }

    #[test]
    fn short_secrets_are_refused() {
        assert!(SigningKey::new("x".repeat(MIN_SECRET_BYTES - 1).into()).is_none());
        assert!(SigningKey::new("x".repeat(MIN_SECRET_BYTES).into()).is_some());
    }

    #[test]
    fn the_previous_secret_verifies_until_it_is_dropped() {
        let old = Keyring::new(key('a'), None);
        let both = Keyring::new(key('b'), Some(key('a')));
        let new = Keyring::new(key('b'), None);
        let mac = old.derive("test").sign(&[b"message"]);
        assert!(both.derive("test").verify(&[b"message"], &mac));
        assert!(!new.derive("test").verify(&[b"message"], &mac));
    }

    #[test]
    fn a_mac_is_good_for_its_purpose_and_parts_only() {
        let keyring = Keyring::new(key('a'), None);
        let keys = keyring.derive("test");
        let mac = keys.sign(&[b"ab", b"c"]);
        assert!(keys.verify(&[b"ab", b"c"], &mac));
        assert!(!keys.verify(&[b"a", b"bc"], &mac));
        assert!(!keys.verify(&[b"abc"], &mac));
        assert!(!keys.verify(&[b"ab", b"c"], &mac[..16]));
        assert!(!keyring.derive("other").verify(&[b"ab", b"c"], &mac));
    }
}
