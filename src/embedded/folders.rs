//! Where data and programs are, who holds them, and what is thrown away.

use std::{
    env,
    fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{self, Path, PathBuf},
    thread,
    time::Duration,
};

use tempfile::TempDir;

use super::{
    Error, postmaster,
    privileges::{self, ServiceUser},
};

const NAME: &str = "fast-zero";
const LOCK: &str = "lock";
/// The mode of folders: for nobody but their owner.
pub(super) const PRIVATE: u32 = 0o700;
/// The system's folders, for a service that root starts.
const SYSTEM_DATA: &str = "/var/lib";
const SYSTEM_CACHE: &str = "/var/cache";
/// Where temporary folders are made. Not `TMPDIR`: it may be too long for a socket's
/// path, or another user's.
const TEMPORARY: &str = "/tmp";
const TEMPORARY_PREFIX: &str = "fast-zero-";
/// How often and after which pause to try again to remove a folder in which processes
/// that were killed may still write for an instant: for one second.
const REMOVALS: u32 = 50;
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);

/// The folder of the data: what `given` names, else the user's own.
pub(super) fn data_folder(given: Option<&Path>) -> Result<PathBuf, Error> {
    match given {
        Some(folder) => path::absolute(folder).map_err(Error::io("finding the folder", folder)),
        None if is_root() => Ok(Path::new(SYSTEM_DATA).join(NAME)),
        None => of_user("data", "XDG_DATA_HOME", ".local/share", "FASTZERO_DATA_DIR"),
    }
}

/// The folder of PostgreSQL's programs.
pub(super) fn cache_folder() -> Result<PathBuf, Error> {
    if is_root() {
        return Ok(Path::new(SYSTEM_CACHE).join(NAME));
    }
    of_user("a cache", "XDG_CACHE_HOME", ".cache", "XDG_CACHE_HOME")
}

/// A folder of the user's (XDG Base Directory Specification 0.8): in the one that the
/// variable `xdg` names, else in `home` of the home folder.
fn of_user(
    purpose: &'static str,
    xdg: &'static str,
    home: &str,
    way_out: &'static str,
) -> Result<PathBuf, Error> {
    // The specification says to ignore a path that is not absolute.
    let absolute = |folder: &PathBuf| folder.is_absolute();
    env::var_os(xdg)
        .map(PathBuf::from)
        .filter(absolute)
        .or_else(|| env::home_dir().filter(absolute).map(|folder| folder.join(home)))
        .map(|folder| folder.join(NAME))
        .ok_or(Error::NoHome { purpose, variable: way_out })
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Makes a folder, and those above it that are missing, for nobody but `owner` (this
/// user if there is none). What is there already stays as it is.
pub(super) fn make(folder: &Path, owner: Option<&ServiceUser>) -> Result<(), Error> {
    if folder.is_dir() {
        return Ok(());
    }
    if let Some(parent) = folder.parent() {
        make(parent, owner)?;
    }
    let made = DirBuilder::new().mode(PRIVATE).create(folder).and_then(|()| match owner {
        Some(owner) => chown(folder, Some(owner.uid.as_raw()), Some(owner.gid.as_raw())),
        None => Ok(()),
    });
    match made {
        // Another process was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        Err(source) => Err(unusable(folder, owner, source)),
        Ok(()) => Ok(()),
    }
}

/// Why a folder cannot be used by this user, which for root's folders is to be `owner`.
/// Names the first folder on the way that cannot be entered.
fn unusable(folder: &Path, owner: Option<&ServiceUser>, source: io::Error) -> Error {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};

    if !matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem) {
        return Error::io("using the folder", folder)(source);
    }
    let closed = |folder: &&Path| {
        let inside = fs::metadata(folder.join("."));
        inside.is_err_and(|error| error.kind() == PermissionDenied)
    };
    let mut from_the_top = folder.ancestors().collect::<Vec<_>>();
    from_the_top.reverse();
    Error::FolderUnusable {
        folder: folder.to_owned(),
        user: owner.map_or_else(privileges::current_user, ToString::to_string),
        at: from_the_top.into_iter().find(closed).unwrap_or(folder).to_owned(),
        source,
    }
}

/// Holds a folder for this process: until it is dropped, or the process ends in
/// whatever way. Programs that are started do not inherit it (it is closed on exec).
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the folder at once; `None` if another process has it.
    pub(super) fn take(folder: &Path) -> Result<Option<Self>, Error> {
        let path = folder.join(LOCK);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(|error| unusable(folder, None, error))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self::sign(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(Error::Io { doing: "locking", path, source }),
        }
    }

    /// Takes a folder that no other process can have seen: it gets its lock under
    /// another name, so that there is never one that nobody holds.
    fn take_fresh(folder: &Path) -> io::Result<Self> {
        let unnamed = folder.join("lock.new");
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unnamed)?;
        file.try_lock()?;
        fs::rename(unnamed, folder.join(LOCK))?;
        Ok(Self::sign(file))
    }

    /// Leaves the number of this process, for the message of whoever comes second. That
    /// the message can do without it is why a failure does not matter.
    fn sign(mut file: File) -> Self {
        let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
        Self { _file: file }
    }

    /// Which process holds the folder, as far as it could be read.
    fn holder(folder: &Path) -> Option<u32> {
        let mut text = String::new();
        File::open(folder.join(LOCK)).ok()?.take(16).read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }
}

/// The folder that holds everything of one PostgreSQL, held by this process.
#[derive(Debug)]
pub(super) enum Home {
    /// Data that stay.
    Kept { folder: PathBuf, _lock: Lock },
    /// Data to be thrown away.
    Temporary(TemporaryFolder),
}

impl Home {
    /// Takes a folder of data that stay, or makes one for data to be thrown away.
    pub(super) async fn take(kept: Option<PathBuf>) -> Result<Self, Error> {
        let Some(folder) = kept else {
            return TemporaryFolder::make().await.map(Self::Temporary);
        };
        match Lock::take(&folder)? {
            Some(lock) => Ok(Self::Kept { folder, _lock: lock }),
            None => Err(Error::InUse { holder: Lock::holder(&folder), folder }),
        }
    }

    pub(super) fn folder(&self) -> &Path {
        match self {
            Self::Kept { folder, .. } => folder,
            Self::Temporary(temporary) => temporary.path(),
        }
    }

    pub(super) fn is_temporary(&self) -> bool {
        matches!(self, Self::Temporary(_))
    }
}

/// A fresh folder, for nobody but this user, that is removed with all that is in it.
#[derive(Debug)]
pub(super) struct TemporaryFolder {
    folder: PathBuf,
    _lock: Lock,
}

impl TemporaryFolder {
    /// Makes one, and clears away those whose processes were killed.
    pub(super) async fn make() -> Result<Self, Error> {
        clear_leftovers().await;
        let failed = || Error::io("making a temporary folder in", TEMPORARY);
        let folder = fresh(Path::new(TEMPORARY), TEMPORARY_PREFIX).map_err(failed())?.keep();
        let lock = Lock::take_fresh(&folder).map_err(failed())?;
        Ok(Self { folder, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.folder
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        remove(&self.folder);
    }
}

/// A new folder in another one, for nobody but this user, removed when it is dropped.
pub(super) fn fresh(folder: &Path, prefix: &str) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).permissions(Permissions::from_mode(PRIVATE)).tempdir_in(folder)
}

/// Waits until the names in a folder are on the disk, for a power failure may come.
pub(super) fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// What is in a folder under names that begin with `prefix`.
pub(super) fn named(folder: &Path, prefix: &str) -> impl Iterator<Item = PathBuf> + use<> {
    let prefix = prefix.as_bytes().to_vec();
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(move |entry| entry.file_name().as_encoded_bytes().starts_with(&prefix))
        .map(|entry| entry.path())
}

/// Removes the folders with such names: what was being made when its process was ended.
pub(super) fn clear(folder: &Path, prefix: &str) {
    named(folder, prefix).for_each(|partial| remove(&partial));
}

/// Removes a folder, also while the last processes in it are just ending.
pub(super) fn remove(folder: &Path) {
    for _ in 0..REMOVALS {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => thread::sleep(REMOVAL_PAUSE),
            _ => return,
        }
    }
    tracing::warn!(folder = %folder.display(), "a folder could not be removed");
}

/// Ends and removes what killed processes of this user left in temporary folders: those
/// that have a lock which nobody holds.
async fn clear_leftovers() {
    let uid = nix::unistd::geteuid().as_raw();
    for folder in named(Path::new(TEMPORARY), TEMPORARY_PREFIX) {
        let ours = fs::symlink_metadata(&folder)
            .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == uid);
        if !ours || !folder.join(LOCK).is_file() {
            continue;
        }
        if let Ok(Some(_lock)) = Lock::take(&folder) {
            tracing::info!(folder = %folder.display(), "clearing what a killed process left");
            match postmaster::end_leftovers_in(&folder).await {
                Ok(()) => remove(&folder),
                Err(error) => tracing::warn!(%error, "something a killed process left stays"),
            }
        }
    }
}
