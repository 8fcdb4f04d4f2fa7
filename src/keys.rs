//! The service's secret, and the keys that are derived from it.

use aws_lc_rs::{hkdf, hmac};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};

/// The least length of a secret, in bytes: that of the hash of HS256 (RFC 7518,
/// section 3.2).
pub const MIN_SECRET_BYTES: usize = 32;

/// The secret that signs, and the one before it, which still verifies.
#[derive(Clone, Debug)]
pub struct Keyring {
    current: SecretString,
    previous: Option<SecretString>,
}

impl Keyring {
    /// Both secrets; `None` if one is shorter than [`MIN_SECRET_BYTES`].
    #[must_use]
    pub fn new(current: SecretString, previous: Option<SecretString>) -> Option<Self> {
        let long_enough = |secret: &SecretString| secret.expose_secret().len() >= MIN_SECRET_BYTES;
        let all_are = long_enough(&current) && previous.as_ref().is_none_or(long_enough);
        all_are.then_some(Self { current, previous })
    }

    /// The secrets, the one that signs first.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = &SecretString> {
        std::iter::once(&self.current).chain(&self.previous)
    }

    /// Keys for one purpose, from which the secret and the keys for other purposes
    /// cannot be told.
    #[must_use]
    pub fn derive(&self, purpose: &'static str) -> MacKeys {
        MacKeys(self.secrets().map(|secret| derive(secret, purpose)).collect())
    }
}

/// Names a secret without telling it: what a token's `kid` says.
#[must_use]
pub fn key_id(secret: &SecretString) -> String {
    let tag = hmac::sign(&derive(secret, "key id"), b"");
    URL_SAFE_NO_PAD.encode(&tag.as_ref()[..8])
}

/// Keys for message authentication codes (HMAC-SHA256): the current one makes them,
/// the previous one still verifies.
#[derive(Clone, Debug)]
pub struct MacKeys(Vec<hmac::Key>);

/// The length of a message authentication code, in bytes.
pub const MAC_BYTES: usize = 32;

impl MacKeys {
    /// Authenticates the parts, in this order.
    #[must_use]
    pub fn sign(&self, parts: &[&[u8]]) -> [u8; MAC_BYTES] {
        let mut mac = [0; MAC_BYTES];
        mac.copy_from_slice(tag(&self.0[0], parts).as_ref());
        mac
    }

    /// Whether one of the keys made `mac` of the parts; in constant time.
    #[must_use]
    pub fn verify(&self, parts: &[&[u8]], mac: &[u8]) -> bool {
        self.0.iter().any(|key| {
            aws_lc_rs::constant_time::verify_slices_are_equal(tag(key, parts).as_ref(), mac).is_ok()
        })
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

/// HKDF (RFC 5869) without a salt: the secret is random already.
fn derive(secret: &SecretString, purpose: &'static str) -> hmac::Key {
    hkdf::Salt::new(hkdf::HKDF_SHA256, &[])
        .extract(secret.expose_secret().as_bytes())
        .expand(&[b"fast-zero ", purpose.as_bytes()], hmac::HMAC_SHA256)
        .expect("a key of the length of one hash can always be derived")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: char) -> SecretString {
        byte.to_string().repeat(MIN_SECRET_BYTES).into()
    }

    #[test]
    fn short_secrets_are_refused() {
        let short = || "x".repeat(MIN_SECRET_BYTES - 1).into();
        assert!(Keyring::new(short(), None).is_none());
        assert!(Keyring::new(secret('a'), Some(short())).is_none());
        assert!(Keyring::new(secret('a'), Some(secret('b'))).is_some());
    }

    #[test]
    fn the_previous_secret_verifies_until_it_is_dropped() {
        let old = Keyring::new(secret('a'), None).expect("long enough");
        let both = Keyring::new(secret('b'), Some(secret('a'))).expect("long enough");
        let new = Keyring::new(secret('b'), None).expect("long enough");
        let mac = old.derive("test").sign(&[b"message"]);
        assert!(both.derive("test").verify(&[b"message"], &mac));
        assert!(!new.derive("test").verify(&[b"message"], &mac));
    }

    #[test]
    fn a_mac_is_good_for_its_purpose_and_parts_only() {
        let keyring = Keyring::new(secret('a'), None).expect("long enough");
        let keys = keyring.derive("test");
        let mac = keys.sign(&[b"ab", b"c"]);
        assert!(keys.verify(&[b"ab", b"c"], &mac));
        assert!(!keys.verify(&[b"a", b"bc"], &mac));
        assert!(!keys.verify(&[b"abc"], &mac));
        assert!(!keys.verify(&[b"ab", b"c"], &mac[..16]));
        assert!(!keyring.derive("other").verify(&[b"ab", b"c"], &mac));
    }
}
