//! Keys that are derived from the secret, and passwords.

pub(crate) mod hashing;
pub(crate) mod keys;
pub(crate) mod password;
