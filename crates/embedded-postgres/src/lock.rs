//! The lock that gives one process exclusive use of a directory.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use crate::{App, Error, dirs};

const LOCK_FILE: &str = "lock";
/// The lock file of an ephemeral directory. Its name marks the directory as one to remove.
const EPHEMERAL_LOCK_FILE: &str = "ephemeral.lock";

/// An exclusive lock on a directory, released on drop and when the process ends. Child
/// processes do not inherit it, because the file is closed on exec.
#[derive(Debug)]
pub(crate) struct DirLock {
    _file: File,
}

impl DirLock {
    /// Acquires the lock without waiting. Returns `None` if another process holds it.
    pub(crate) fn try_acquire(app: &App, dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(LOCK_FILE);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(|error| dirs::not_usable(app, dir, None, error))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self::write_pid(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(Error::io("lock", path)(source)),
        }
    }

    /// Acquires the lock of a new ephemeral directory. The file gets its name after it is
    /// locked, so that no other process ever sees it unlocked.
    pub(crate) fn acquire_ephemeral(dir: &Path) -> io::Result<Self> {
        let unnamed = dir.join("lock.new");
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unnamed)?;
        file.try_lock()?;
        fs::rename(unnamed, dir.join(EPHEMERAL_LOCK_FILE))?;
        Ok(Self { _file: file })
    }

    /// Acquires the lock of an ephemeral directory whose process has ended. Returns `None` if
    /// a process holds the lock, or if the directory is not an ephemeral one.
    pub(crate) fn try_acquire_stale(dir: &Path) -> Option<Self> {
        let file = File::open(dir.join(EPHEMERAL_LOCK_FILE)).ok()?;
        file.try_lock().ok()?;
        Some(Self { _file: file })
    }

    /// Writes the ID of this process for the error message of another one. A failure is
    /// ignored, because that message is complete without the ID.
    fn write_pid(mut file: File) -> Self {
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        Self { _file: file }
    }

    /// Returns the ID of the process that holds the lock, if it can be read.
    pub(crate) fn owner_pid(dir: &Path) -> Option<u32> {
        let mut text = String::new();
        File::open(dir.join(LOCK_FILE)).ok()?.take(16).read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }
}
