//! Directories: their default paths, and how they are created, synced and removed.

use std::{
    env,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown},
    path::{self, Path, PathBuf},
    thread,
    time::Duration,
};

use tempfile::TempDir;

use crate::{
    App, Error,
    privileges::{self, ServiceUser},
};

/// The mode of directories: accessible to their owner only.
pub(crate) const PRIVATE_DIR_MODE: u32 = 0o700;
/// The parents of root's directories (Filesystem Hierarchy Standard 3.0).
const SYSTEM_DATA_DIR: &str = "/var/lib";
const SYSTEM_CACHE_DIR: &str = "/var/cache";
/// How often and at which interval a removal is retried, for 1 s in total: killed processes
/// may write to the directory until the system has ended them.
const MAX_REMOVE_ATTEMPTS: u32 = 50;
const REMOVE_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Returns the data directory: `given`, or the user's own.
pub(crate) fn data_dir(app: &App, given: Option<&Path>) -> Result<PathBuf, Error> {
    match given {
        Some(dir) => path::absolute(dir).map_err(Error::io("resolve", dir)),
        None if is_root() => Ok(Path::new(SYSTEM_DATA_DIR).join(app.name)),
        None => user_dir(app, "data", "XDG_DATA_HOME", ".local/share", app.data_dir_var),
    }
}

/// Returns the directory of PostgreSQL's programs.
pub(crate) fn cache_dir(app: &App) -> Result<PathBuf, Error> {
    if is_root() {
        return Ok(Path::new(SYSTEM_CACHE_DIR).join(app.name));
    }
    user_dir(app, "cache", "XDG_CACHE_HOME", ".cache", "XDG_CACHE_HOME")
}

/// Returns the user's directory for `purpose` (XDG Base Directory Specification 0.8): below
/// the path in `xdg_var`, or else below `default` in the home directory.
fn user_dir(
    app: &App,
    purpose: &'static str,
    xdg_var: &'static str,
    default: &str,
    setting: &'static str,
) -> Result<PathBuf, Error> {
    // The specification says to ignore a path that is not absolute.
    let absolute = |dir: &PathBuf| dir.is_absolute();
    env::var_os(xdg_var)
        .map(PathBuf::from)
        .filter(absolute)
        .or_else(|| env::home_dir().filter(absolute).map(|dir| dir.join(default)))
        .map(|dir| dir.join(app.name))
        .ok_or(Error::NoHomeDir { purpose, setting, alternative: app.alternative })
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Creates a directory and its missing parents, accessible to `owner` only, or to this user
/// if that is `None`. An existing directory does not change.
pub(crate) fn create_private_dir_all(
    app: &App,
    dir: &Path,
    owner: Option<&ServiceUser>,
) -> Result<(), Error> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        create_private_dir_all(app, parent, owner)?;
    }
    let created = DirBuilder::new().mode(PRIVATE_DIR_MODE).create(dir).and_then(|()| match owner {
        Some(owner) => chown(dir, Some(owner.uid.as_raw()), Some(owner.gid.as_raw())),
        None => Ok(()),
    });
    match created {
        // Another process has created it in the meantime.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(source) => Err(not_usable(app, dir, owner, source)),
        Ok(()) => Ok(()),
    }
}

/// Returns the error for a directory that `owner`, or this user if that is `None`, cannot
/// use.
pub(crate) fn not_usable(
    app: &App,
    dir: &Path,
    owner: Option<&ServiceUser>,
    source: io::Error,
) -> Error {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};

    if !matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem) {
        return Error::io("use the directory", dir)(source);
    }
    let cannot_be_entered = |dir: &&Path| {
        let inside = fs::metadata(dir.join("."));
        inside.is_err_and(|error| error.kind() == PermissionDenied)
    };
    let mut from_root = dir.ancestors().collect::<Vec<_>>();
    from_root.reverse();
    Error::DirNotUsable {
        dir: dir.to_owned(),
        os_user: owner.map_or_else(privileges::current_user, ToString::to_string),
        blocked_at: from_root.into_iter().find(cannot_be_entered).unwrap_or(dir).to_owned(),
        setting: app.data_dir_var,
        source,
    }
}

/// Creates a directory with a unique name, accessible to this user only and removed on
/// drop.
pub(crate) fn create_temp_dir(parent: &Path, prefix: &str) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    let private = Permissions::from_mode(PRIVATE_DIR_MODE);
    builder.prefix(prefix).permissions(private).tempdir_in(parent)
}

/// Flushes a directory's entries to the disk, so that a rename survives a power failure.
pub(crate) fn fsync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Flushes all files and directories in a directory to the disk, so that a power failure
/// leaves no partial file behind a final name.
pub(crate) fn fsync_dir_all(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            fsync_dir_all(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    fsync_dir(dir)
}

/// Returns the paths of a directory's entries whose names begin with `prefix`.
pub(crate) fn entries_with_prefix(
    dir: &Path,
    prefix: &str,
) -> impl Iterator<Item = PathBuf> + use<> {
    let prefix = prefix.as_bytes().to_vec();
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(move |entry| entry.file_name().as_encoded_bytes().starts_with(&prefix))
        .map(|entry| entry.path())
}

/// Removes the directories that a process was filling when it was killed.
pub(crate) fn remove_partial(dir: &Path, prefix: &str) {
    entries_with_prefix(dir, prefix).for_each(|partial| remove_dir_retrying(&partial));
}

/// Removes a directory, even if the last processes that use it are just exiting.
pub(crate) fn remove_dir_retrying(dir: &Path) {
    for _ in 0..MAX_REMOVE_ATTEMPTS {
        match fs::remove_dir_all(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                thread::sleep(REMOVE_RETRY_DELAY);
            }
            _ => return,
        }
    }
    tracing::warn!(dir = %dir.display(), "failed to remove directory");
}
