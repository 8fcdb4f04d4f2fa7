//! Keys that are derived from the secret, random secrets, and passwords.

pub(crate) mod checksummed_text;
pub(crate) mod hashing;
pub(crate) mod keys;
pub(crate) mod month_key;
pub(crate) mod password;
pub(crate) mod random_secret;
