//! The key that signs tokens, kept with the private PostgreSQL's data.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use secrecy::{ExposeSecret, SecretString};

use crate::keys::MIN_SECRET_BYTES;

use super::{Error, folders, privileges::ServiceUser};

const FILE: &str = "secret_key";

/// The signing key of the data in `data_dir`, or in the user's own folder if there is
/// none: the one that is kept there, or a new one that is kept from now on.
///
/// # Errors
/// When the folder cannot be used, or the file holds something else than a key.
pub fn kept_secret_key(data_dir: Option<&Path>) -> Result<SecretString, Error> {
    let folder = folders::data_folder(data_dir)?;
    let file = folder.join(FILE);
    let kept = if let Some(kept) = read(&file)? {
        kept
    } else {
        folders::make(&folder, ServiceUser::needed().as_ref())?;
        keep(&folder, &file, &super::random_text()?)?;
        // Another process may have been faster: its key is the one.
        read(&file)?.unwrap_or_default()
    };
    if kept.expose_secret().len() < MIN_SECRET_BYTES {
        return Err(Error::SecretKey { file });
    }
    Ok(kept)
}

/// `None` where there is no such file.
fn read(file: &Path) -> Result<Option<SecretString>, Error> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text.trim_end().into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            Err(Error::SecretKey { file: file.to_owned() })
        }
        Err(error) => Err(Error::io("reading", file)(error)),
    }
}

/// Writes the key, all or nothing, for nobody but this user; unless there is one.
fn keep(folder: &Path, file: &Path, key: &SecretString) -> Result<(), Error> {
    let write = || {
        let mut partial = tempfile::NamedTempFile::new_in(folder)?;
        partial.write_all(key.expose_secret().as_bytes())?;
        partial.as_file().sync_all()?;
        match partial.persist_noclobber(file) {
            Err(failed) if failed.error.kind() != io::ErrorKind::AlreadyExists => Err(failed.error),
            _ => folders::sync(folder),
        }
    };
    write().map_err(Error::io("keeping the signing key in", file))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_key_is_made_once_and_for_its_owner() {
        let place = tempfile::tempdir().expect("a temporary folder");
        let folder = place.path().join("data");
        let key = kept_secret_key(Some(&folder)).expect("a new key");
        assert!(key.expose_secret().len() >= MIN_SECRET_BYTES);
        let again = kept_secret_key(Some(&folder)).expect("the kept key");
        assert_eq!(again.expose_secret(), key.expose_secret());
        for (path, mode) in [(folder.join(FILE), 0o600), (folder, 0o700)] {
            let metadata = fs::metadata(path).expect("it is there");
            assert_eq!(metadata.permissions().mode() & 0o777, mode);
        }
    }

    #[test]
    fn two_at_once_get_the_same_key() {
        let place = tempfile::tempdir().expect("a temporary folder");
        let keys: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| kept_secret_key(Some(place.path())))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let keys: Vec<_> = keys.into_iter().map(|key| key.expect("a key")).collect();
        assert!(keys.iter().all(|key| key.expose_secret() == keys[0].expose_secret()));
    }

    #[test]
    fn what_is_no_key_is_refused_and_kept() {
        let place = tempfile::tempdir().expect("a temporary folder");
        for text in [&b""[..], b"short\n", b"\xff\xfe"] {
            fs::write(place.path().join(FILE), text).expect("a file");
            let error = kept_secret_key(Some(place.path())).expect_err("no key");
            assert!(matches!(error, Error::SecretKey { .. }), "{error}");
            assert!(error.to_string().contains(FILE));
            assert_eq!(fs::read(place.path().join(FILE)).expect("a file"), text);
        }
    }
}
