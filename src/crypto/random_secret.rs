//! A secret of 256 random bits, and the hash that the database stores of it.
//!
//! No attacker can guess such a secret, so one pass of SHA-256 protects it as well as a slow hash.

use std::fmt;

use aws_lc_rs::{constant_time::verify_slices_are_equal, digest, rand};

/// The length of a secret and of its hash, in bytes.
pub const SECRET_BYTES: usize = 32;

/// A random secret.
#[derive(Clone)]
pub struct RandomSecret([u8; SECRET_BYTES]);

impl RandomSecret {
    /// Generates a secret.
    #[must_use]
    pub fn generate() -> Self {
        let mut bytes = [0; SECRET_BYTES];
        rand::fill(&mut bytes).expect("the system gives random bytes");
        Self(bytes)
    }

    /// Wraps the bytes that a client presents.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Self {
        Self(bytes)
    }

    /// Returns the bytes, of which the text for the client is made.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }

    /// Returns the hash.
    #[must_use]
    pub fn hash(&self) -> SecretHash {
        SecretHash(sha256(&self.0))
    }
}

impl fmt::Debug for RandomSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("RandomSecret(…)")
    }
}

/// The SHA-256 of a secret.
#[derive(Clone)]
pub struct SecretHash([u8; SECRET_BYTES]);

impl SecretHash {
    /// Wraps a hash from the database. Returns `None` if it has another length.
    #[must_use]
    pub fn from_stored(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Returns the hash as the database stores it.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

/// Compares in constant time.
impl PartialEq for SecretHash {
    fn eq(&self, other: &Self) -> bool {
        verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl fmt::Debug for SecretHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("SecretHash(…)")
    }
}

fn sha256(bytes: &[u8]) -> [u8; SECRET_BYTES] {
    let mut hash = [0; SECRET_BYTES];
    hash.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_matches_its_secret_only() {
        let secret = RandomSecret::generate();
        let stored = SecretHash::from_stored(secret.hash().as_bytes()).expect("32 bytes");
        assert!(stored == secret.hash());
        assert!(stored == RandomSecret::from_bytes(*secret.as_bytes()).hash());
        assert!(stored != RandomSecret::generate().hash());
        assert!(SecretHash::from_stored(&[0; 31]).is_none());
    }

    #[test]
    fn nothing_shows_a_secret() {
        let secret = RandomSecret::generate();
        let shown = format!("{secret:?} {:?}", secret.hash());
        assert_eq!(shown, "RandomSecret(…) SecretHash(…)");
    }
}
