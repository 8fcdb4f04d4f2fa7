//! The temporary directory of a run.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use tempfile::TempDir;

use crate::error::Result;

/// The parent of all run directories. Not `TMPDIR`: the operating system user that runs
/// the embedded PostgreSQL must be able to enter it.
const PARENT: &str = "/tmp";
const PREFIX: &str = "fast-zero-bench-";
const LOCK_FILE: &str = "lock";

/// The directory of a run, removed on drop.
///
/// If a run is killed, the next run finds the directory without a lock and removes it.
#[derive(Debug)]
pub struct RunDir {
    dir: TempDir,
    /// The locked file. The lock ends with the process.
    _lock: File,
}

impl RunDir {
    /// Creates the directory and removes those of killed runs.
    pub fn create() -> Result<Self> {
        remove_stale_dirs()?;
        let world_readable = Permissions::from_mode(0o755);
        let dir = tempfile::Builder::new()
            .prefix(PREFIX)
            .permissions(world_readable)
            .tempdir_in(PARENT)?;
        // The file gets its name after it is locked, so that no other run sees it unlocked.
        let unlocked = dir.path().join("lock.new");
        let lock = File::create(&unlocked)?;
        lock.try_lock().map_err(|error| format!("cannot lock the run directory: {error}"))?;
        fs::rename(unlocked, dir.path().join(LOCK_FILE))?;
        Ok(Self { dir, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

fn remove_stale_dirs() -> Result<()> {
    for entry in fs::read_dir(PARENT)?.flatten() {
        if !entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let lock = File::open(entry.path().join(LOCK_FILE));
        if lock.is_ok_and(|lock| lock.try_lock().is_ok()) {
            // A run that starts at the same time may remove the directory first.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}
