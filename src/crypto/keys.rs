//! The service's secret and the keys derived from it.
//!
//! [`month_key`](super::month_key) derives the signing keys of access tokens.

use aws_lc_rs::{constant_time::verify_slices_are_equal, hkdf, hmac};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};

/// The minimum length of a secret, in bytes: the output length of SHA-256, which RFC 7518
/// (section 3.2) requires for HS256.
///
/// Test: `short_secrets_are_rejected`.
pub const MIN_SECRET_BYTES: usize = 32;

/// The length of a derived key, in bytes: one hash of SHA-256.
const DERIVED_KEY_BYTES: usize = 32;

/// A secret of at least [`MIN_SECRET_BYTES`] bytes.
#[derive(Clone, Debug)]
pub struct SecretKey(SecretString);

impl SecretKey {
    /// Wraps a secret. Returns `None` if it is shorter than [`MIN_SECRET_BYTES`].
    #[must_use]
    pub fn new(secret: SecretString) -> Option<Self> {
        (secret.expose_secret().len() >= MIN_SECRET_BYTES).then_some(Self(secret))
    }

    /// Returns the raw secret, which is the key of access tokens that are signed with HS256.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.expose_secret().as_bytes()
    }

    /// Returns the ID of the key for a token's `kid`. It does not reveal the secret.
    #[must_use]
    pub fn key_id(&self) -> String {
        let tag = hmac::sign(&self.derive("key id"), b"");
        URL_SAFE_NO_PAD.encode(&tag.as_ref()[..8])
    }

    fn derive(&self, purpose: &'static str) -> hmac::Key {
        let key = self.expand(&[b"fast-zero ", purpose.as_bytes()]);
        hmac::Key::new(hmac::HMAC_SHA256, &key)
    }

    /// Derives a key with HKDF-SHA256 (RFC 5869), without a salt because the secret is random.
    pub(super) fn expand(&self, info: &[&[u8]]) -> [u8; DERIVED_KEY_BYTES] {
        let mut key = [0; DERIVED_KEY_BYTES];
        hkdf::Salt::new(hkdf::HKDF_SHA256, &[])
            .extract(self.as_bytes())
            .expand(info, hkdf::HKDF_SHA256)
            .and_then(|output| output.fill(&mut key))
            .expect("a key of the length of one hash can always be derived");
        key
    }
}

/// The current key, which signs, and the previous key, which still verifies.
#[derive(Clone, Debug)]
pub struct Keyring {
    /// The key that signs and verifies.
    pub current: SecretKey,
    /// The key before the last rotation, which only verifies.
    pub previous: Option<SecretKey>,
}

impl Keyring {
    /// Creates a keyring from both keys. If they are the same, there is one.
    #[must_use]
    pub fn new(current: SecretKey, previous: Option<SecretKey>) -> Self {
        let previous = previous.filter(|previous| previous.as_bytes() != current.as_bytes());
        Self { current, previous }
    }

    /// Returns the keys that verify, the current key first.
    pub fn verification_keys(&self) -> impl Iterator<Item = &SecretKey> {
        std::iter::once(&self.current).chain(&self.previous)
    }

    /// Derives the keys for one purpose. They reveal neither the secrets nor the keys for
    /// other purposes.
    #[must_use]
    pub fn derive(&self, purpose: &'static str) -> MacKeys {
        MacKeys {
            current: self.current.derive(purpose),
            previous: self.previous.as_ref().map(|key| key.derive(purpose)),
        }
    }
}

/// Keys for message authentication codes (HMAC-SHA256). The current key signs, the previous
/// key still verifies.
#[derive(Clone, Debug)]
pub struct MacKeys {
    current: hmac::Key,
    previous: Option<hmac::Key>,
}

/// The length of a message authentication code, in bytes.
pub const MAC_BYTES: usize = 32;

impl MacKeys {
    /// Computes the message authentication code of the parts, in this order.
    #[must_use]
    pub fn sign(&self, parts: &[&[u8]]) -> [u8; MAC_BYTES] {
        let mut mac = [0; MAC_BYTES];
        mac.copy_from_slice(tag(&self.current, parts).as_ref());
        mac
    }

    /// Returns `true` if `mac` is the code of the parts under one of the keys. Compares in
    /// constant time.
    #[must_use]
    pub fn verify(&self, parts: &[&[u8]], mac: &[u8]) -> bool {
        std::iter::once(&self.current)
            .chain(&self.previous)
            .any(|key| verify_slices_are_equal(tag(key, parts).as_ref(), mac).is_ok())
    }
}

/// Prefixes each part with its length, so that different lists of parts never produce the
/// same message.
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

    fn key(byte: char) -> SecretKey {
        SecretKey::new(byte.to_string().repeat(MIN_SECRET_BYTES).into()).expect("long enough")
    }

    #[test]
    fn short_secrets_are_rejected() {
        assert!(SecretKey::new("x".repeat(31).into()).is_none());
        assert!(SecretKey::new("x".repeat(32).into()).is_some());
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
    fn equal_secrets_are_one() {
        let keyring = Keyring::new(key('a'), Some(key('a')));
        assert_eq!(keyring.verification_keys().count(), 1);
    }

    #[test]
    fn a_mac_is_valid_for_its_purpose_and_parts_only() {
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
