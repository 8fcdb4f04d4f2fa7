//! PostgreSQL processes that outlived their supervisor.

use std::{path::Path, time::Duration};

use tokio::time::sleep;

use crate::{
    Error, layout,
    pid_file::{PidFile, is_postmaster_of, to_pid},
    shutdown::terminate,
};

const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Stops the PostgreSQL processes that use a cluster in `data_dir`, and removes the pid
/// files that would prevent a new start. The caller must hold the directory's lock.
pub(crate) async fn stop_orphans(data_dir: &Path) -> Result<(), Error> {
    for cluster in layout::clusters(data_dir) {
        let cluster = cluster.canonicalize().map_err(Error::io("resolve", &cluster))?;
        let Some(file) = PidFile::read(&cluster) else { continue };
        if let Some(pid) = to_pid(file.pid).filter(|&pid| is_postmaster_of(pid, &cluster)) {
            tracing::warn!(%pid, dir = %cluster.display(), "stopping orphaned PostgreSQL");
            let exited = async || {
                while is_postmaster_of(pid, &cluster) {
                    sleep(EXIT_POLL_INTERVAL).await;
                }
            };
            if !terminate(pid, exited).await {
                return Err(Error::OrphanedPostgres { pid: pid.as_raw(), dir: cluster });
            }
        }
        // PostgreSQL trusts a pid file if any process has that ID. If other processes of
        // the orphan still run, the memory that they share prevents a new start.
        PidFile::remove(&cluster)?;
    }
    Ok(())
}
