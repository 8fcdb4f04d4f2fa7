//! PostgreSQL's shutdown.

use std::time::Duration;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::timeout;

/// The signals of PostgreSQL's shutdown modes, each with its timeout.
///
/// SIGINT (fast) closes all connections and writes a checkpoint; its timeout is short
/// enough for PostgreSQL to be gone after 5 s. SIGQUIT (immediate) leaves the recovery to the
/// next start; after 5 s PostgreSQL kills those of its processes that do not react. SIGKILL
/// is the last resort.
const SHUTDOWN_SEQUENCE: [(Signal, Duration); 3] = [
    (Signal::SIGINT, Duration::from_millis(3_500)),
    (Signal::SIGQUIT, Duration::from_secs(6)),
    (Signal::SIGKILL, Duration::from_secs(1)),
];

/// Stops the main process of a PostgreSQL, with increasing force. `exited` waits for its
/// exit. Returns `true` if it has exited.
pub(crate) async fn terminate(pid: Pid, mut exited: impl AsyncFnMut()) -> bool {
    for (signal, limit) in SHUTDOWN_SEQUENCE {
        // The process may have exited in the meantime.
        let _ = kill(pid, signal);
        if timeout(limit, exited()).await.is_ok() {
            return true;
        }
        tracing::warn!(%pid, %signal, "PostgreSQL did not stop in time");
    }
    false
}
