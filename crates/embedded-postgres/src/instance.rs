//! The directory of one PostgreSQL, locked by this process.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use crate::{App, Error, dirs, error::ErrorChain, lock::DirLock, orphans};

/// The parent of ephemeral directories. `TMPDIR` may be too long for the path of a socket,
/// or another user's.
const TEMP_DIR: &str = "/tmp";

/// How long a start waits for a process that is stopping in the same directory, which usually takes
/// less than a second. A service manager restarts a killed application at once.
const STOP_WAIT: Duration = Duration::from_secs(3);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A data directory, locked by this process.
#[derive(Debug)]
pub(crate) enum InstanceDir {
    /// The directory remains.
    Persistent { dir: PathBuf, _lock: DirLock },
    /// The directory is removed on drop.
    Ephemeral(EphemeralDir),
}

impl InstanceDir {
    /// Locks `persistent`, or creates an ephemeral directory if that is `None`. Waits a few
    /// seconds for another process to release the lock.
    pub(crate) async fn acquire(app: &App, persistent: Option<PathBuf>) -> Result<Self, Error> {
        let Some(dir) = persistent else {
            return EphemeralDir::create(app).await.map(Self::Ephemeral);
        };
        let deadline = Instant::now() + STOP_WAIT;
        loop {
            if let Some(lock) = DirLock::try_acquire(app, &dir)? {
                return Ok(Self::Persistent { dir, _lock: lock });
            }
            if Instant::now() >= deadline {
                let owner_pid = DirLock::owner_pid(&dir);
                return Err(Error::InUse { owner_pid, dir, setting: app.data_dir_var });
            }
            sleep(LOCK_POLL_INTERVAL).await;
        }
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::Persistent { dir, .. } => dir,
            Self::Ephemeral(ephemeral) => ephemeral.path(),
        }
    }

    pub(crate) fn is_ephemeral(&self) -> bool {
        matches!(self, Self::Ephemeral(_))
    }
}

/// A new directory, accessible to this user only and removed on drop with its contents.
#[derive(Debug)]
pub(crate) struct EphemeralDir {
    dir: PathBuf,
    _lock: DirLock,
}

impl EphemeralDir {
    /// Creates a directory, after removing those of processes that were killed.
    pub(crate) async fn create(app: &App) -> Result<Self, Error> {
        remove_stale_dirs(app).await;
        let failed = || Error::io("create a temporary directory in", TEMP_DIR);
        let dir =
            dirs::create_temp_dir(Path::new(TEMP_DIR), &prefix(app)).map_err(failed())?.keep();
        let lock = DirLock::acquire_ephemeral(&dir).map_err(failed())?;
        Ok(Self { dir, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for EphemeralDir {
    fn drop(&mut self) {
        dirs::remove_dir_retrying(&self.dir);
    }
}

fn prefix(app: &App) -> String {
    format!("{}-", app.name)
}

/// Removes this user's ephemeral directories whose lock no process holds, and stops the
/// PostgreSQL processes in them. A persistent directory with the same prefix has no such lock.
async fn remove_stale_dirs(app: &App) {
    let uid = nix::unistd::geteuid().as_raw();
    for dir in dirs::entries_with_prefix(Path::new(TEMP_DIR), &prefix(app)) {
        let own = fs::symlink_metadata(&dir)
            .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == uid);
        if own && let Some(_lock) = DirLock::try_acquire_stale(&dir) {
            tracing::info!(dir = %dir.display(), "removing stale directory");
            match orphans::stop_orphans(&dir).await {
                Ok(()) => dirs::remove_dir_retrying(&dir),
                Err(error) => {
                    let error = ErrorChain(&error);
                    tracing::warn!(%error, "failed to remove stale directory");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APP: App = App {
        name: "some-app-with-stale-directories",
        database: "some_app",
        child_args: &[],
        data_dir_var: "SOME_DATA_DIR",
        withheld_vars: &[],
        alternative: "set SOME_DATABASE",
    };

    #[tokio::test]
    async fn only_stale_ephemeral_directories_are_removed() {
        let new_dir = || dirs::create_temp_dir(Path::new(TEMP_DIR), &prefix(&APP));
        let persistent = new_dir().expect("a directory");
        let stopped = InstanceDir::acquire(&APP, Some(persistent.path().to_owned())).await;
        drop(stopped.expect("the lock"));
        let stale = new_dir().expect("a directory").keep();
        drop(DirLock::acquire_ephemeral(&stale).expect("the lock"));

        let in_use = EphemeralDir::create(&APP).await.expect("a directory");
        let other = EphemeralDir::create(&APP).await.expect("a directory");
        assert!(persistent.path().join("lock").is_file(), "the data is not removed");
        assert!(!stale.exists());
        assert!(in_use.path().is_dir() && other.path().is_dir());
    }
}
