//! Secrets of the application in its data directory.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use secrecy::{ExposeSecret, SecretString};

use crate::{App, Error, dirs, privileges::ServiceUser, random::random_secret};

/// A file in the data directory that contains a secret of the application.
#[derive(Clone, Copy, Debug)]
pub struct SecretFile {
    /// The name of the file in the data directory.
    pub name: &'static str,
    /// The minimum length of the secret in bytes: at most 43, the length of a new one.
    pub min_bytes: usize,
    /// What the operator can do about an invalid file, as a clause for the error message:
    /// "remove the file to create a new secret".
    pub remedy: &'static str,
}

impl SecretFile {
    /// Returns the secret in the data directory `data_dir`, or in the user's own one if that
    /// is `None`. Creates it, accessible to the owner of the directory only, if it does not
    /// exist.
    ///
    /// # Errors
    /// Returns [`Error::InvalidSecret`] if the file contains no text or a shorter one, and
    /// another error if the directory cannot be used. An existing file is never changed.
    pub fn load_or_create(
        &self,
        app: &App,
        data_dir: Option<&Path>,
    ) -> Result<SecretString, Error> {
        let dir = dirs::data_dir(app, data_dir)?;
        let file = dir.join(self.name);
        let secret = if let Some(secret) = self.read(&file)? {
            secret
        } else {
            dirs::create_private_dir_all(app, &dir, ServiceUser::detect().as_ref())?;
            write_if_missing(&dir, &file, &random_secret()?)?;
            // The secret of another process wins if that process was faster.
            self.read(&file)?.unwrap_or_default()
        };
        if secret.expose_secret().len() < self.min_bytes {
            return Err(self.invalid(&file));
        }
        Ok(secret)
    }

    /// Returns `None` if there is no such file.
    fn read(&self, file: &Path) -> Result<Option<SecretString>, Error> {
        match fs::read_to_string(file) {
            Ok(text) => Ok(Some(text.trim_end().into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(self.invalid(file)),
            Err(error) => Err(Error::io("read", file)(error)),
        }
    }

    fn invalid(&self, file: &Path) -> Error {
        Error::InvalidSecret {
            file: file.to_owned(),
            min_bytes: self.min_bytes,
            remedy: self.remedy,
        }
    }
}

/// Writes the file atomically, unless it exists.
fn write_if_missing(dir: &Path, file: &Path, secret: &SecretString) -> Result<(), Error> {
    let write = || {
        let mut partial = tempfile::NamedTempFile::new_in(dir)?;
        partial.write_all(secret.expose_secret().as_bytes())?;
        partial.as_file().sync_all()?;
        match partial.persist_noclobber(file) {
            Err(failed) if failed.error.kind() != io::ErrorKind::AlreadyExists => Err(failed.error),
            _ => dirs::fsync_dir(dir),
        }
    };
    write().map_err(Error::io("write", file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const APP: App = App {
        name: "some-app",
        database: "some_app",
        child_args: &[],
        data_dir_var: "SOME_DATA_DIR",
        withheld_vars: &[],
        alternative: "set SOME_DATABASE",
    };
    const FILE: SecretFile =
        SecretFile { name: "some_secret", min_bytes: 32, remedy: "remove the file" };

    fn load_or_create(data_dir: &Path) -> Result<SecretString, Error> {
        FILE.load_or_create(&APP, Some(data_dir))
    }

    #[test]
    fn the_secret_is_created_once_and_for_its_owner() {
        let temp_dir = tempfile::tempdir().expect("a temporary directory");
        let dir = temp_dir.path().join("data");
        let secret = load_or_create(&dir).expect("a new secret");
        assert!(secret.expose_secret().len() >= FILE.min_bytes);
        let again = load_or_create(&dir).expect("the stored secret");
        assert_eq!(again.expose_secret(), secret.expose_secret());
        for (path, mode) in [(dir.join(FILE.name), 0o600), (dir, 0o700)] {
            let metadata = fs::metadata(path).expect("it exists");
            assert_eq!(metadata.permissions().mode() & 0o777, mode);
        }
    }

    #[test]
    fn concurrent_callers_get_the_same_secret() {
        let temp_dir = tempfile::tempdir().expect("a temporary directory");
        let secrets: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| load_or_create(temp_dir.path()))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let secrets: Vec<_> = secrets.into_iter().map(|secret| secret.expect("a secret")).collect();
        let first = secrets[0].expose_secret();
        assert!(secrets.iter().all(|secret| secret.expose_secret() == first));
    }

    #[test]
    fn an_invalid_file_is_rejected_and_not_changed() {
        let temp_dir = tempfile::tempdir().expect("a temporary directory");
        let file = temp_dir.path().join(FILE.name);
        for text in [&b""[..], b"short\n", b"\xff\xfe"] {
            fs::write(&file, text).expect("a file");
            let error = load_or_create(temp_dir.path()).expect_err("an invalid secret");
            assert!(matches!(error, Error::InvalidSecret { .. }), "{error}");
            assert!(error.to_string().contains(FILE.name));
            assert!(error.to_string().contains(FILE.remedy));
            assert_eq!(fs::read(&file).expect("a file"), text);
        }
    }
}
