//! The embedded PostgreSQL with the names and settings of this service.

use std::path::Path;

use embedded_postgres::{App, SecretFile};
use secrecy::SecretString;

pub(super) use embedded_postgres::{EmbeddedPostgres, Error, Options};

use crate::crypto::keys::MIN_SECRET_BYTES;

const APP: App = App {
    name: "fast-zero",
    database: "fast_zero",
    child_args: &["postgres", "--lifeline"],
    data_dir_var: "FASTZERO_DATA_DIR",
    withheld_vars: &["SECRET_KEY", "SECRET_KEY_PREVIOUS"],
    alternative: "set DATABASE_URL to use another PostgreSQL server",
};

const SECRET_KEY_FILE: SecretFile = SecretFile {
    name: "secret_key",
    min_bytes: MIN_SECRET_BYTES,
    remedy: "remove the file to create a new signing key, which invalidates all tokens, or set \
             SECRET_KEY",
};

/// Starts PostgreSQL as a child process; see [`EmbeddedPostgres::start`].
///
/// # Errors
/// If there is no PostgreSQL.
pub(super) async fn start(data_dir: Option<&Path>) -> Result<EmbeddedPostgres, Error> {
    EmbeddedPostgres::start(&APP, data_dir).await
}

/// Runs PostgreSQL in this process, for `fast-zero postgres`; see [`embedded_postgres::run`].
///
/// # Errors
/// If there is no PostgreSQL, or if it exits without a request.
pub(super) fn run(options: &Options) -> Result<(), Error> {
    embedded_postgres::run(&APP, options)
}

/// Returns the signing key in the data directory, or creates it.
///
/// # Errors
/// If the directory cannot be used, or the file contains no signing key.
pub(super) fn load_or_create_secret_key(data_dir: Option<&Path>) -> Result<SecretString, Error> {
    SECRET_KEY_FILE.load_or_create(&APP, data_dir)
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    #[test]
    fn the_signing_key_is_stored_and_long_enough() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let key = load_or_create_secret_key(Some(dir.path())).expect("a new key");
        let stored = std::fs::read_to_string(dir.path().join("secret_key")).expect("the file");
        assert_eq!(stored, key.expose_secret());
        assert!(key.expose_secret().len() >= MIN_SECRET_BYTES);
    }

    #[test]
    fn an_invalid_signing_key_is_explained() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(dir.path().join("secret_key"), "short").expect("a file");
        let error = load_or_create_secret_key(Some(dir.path())).expect_err("an invalid key");
        let message = error.to_string();
        for part in ["secret_key", "32 bytes", "SECRET_KEY"] {
            assert!(message.contains(part), "{part} is not in: {message}");
        }
    }
}
