//! The sweep of deleted todos: every replica purges the content of old ones, and removes the
//! tombstones of older ones.

use std::time::Duration;

use tokio::time::sleep;

use super::{CONTENT_RETENTION_MICROS, TOMBSTONE_RETENTION_MICROS, store::sweep};
use crate::{
    database::Database,
    rpc::error::Error,
    telemetry::metrics::Counter,
    types::{error_chain::ErrorChain, jitter::with_jitter},
};

/// The interval between two sweeps of a replica. How much longer a deleted todo is stored than its
/// purge time says, at most, as long as a replica runs.
const SWEEP_INTERVAL: Duration = Duration::from_hours(1);

/// Sweeps the deleted todos of all owners.
#[derive(Debug)]
pub(crate) struct TrashSweeper {
    pub(crate) database: Database,
    /// Counts the todos whose content is purged.
    pub(crate) purged: Counter,
    /// Counts the tombstones that are removed.
    pub(crate) removed: Counter,
}

impl TrashSweeper {
    /// Sweeps at once and then at each interval, until the future is dropped.
    pub(crate) async fn run(self) {
        loop {
            if let Err(error) = self.sweep(self.database.clock().now_micros()).await {
                let error = error.into_source();
                tracing::warn!(error = %ErrorChain(&*error), "failed to sweep deleted todos");
            }
            sleep(with_jitter(SWEEP_INTERVAL)).await;
        }
    }

    /// Sweeps until nothing is left to do, or other replicas do it. `now` is in microseconds since
    /// 1970.
    async fn sweep(&self, now: i64) -> Result<(), Error> {
        let cutoffs = sweep::Cutoffs {
            content: now - CONTENT_RETENTION_MICROS,
            tombstone: now - TOMBSTONE_RETENTION_MICROS,
        };
        loop {
            let due = async |connection: &mut _| sweep::find_due(connection, cutoffs).await;
            let mut changed = 0;
            for owner_id in self.database.run(due).await? {
                let swept = self.database.run(async |connection| {
                    sweep::sweep_owner(connection, owner_id, cutoffs).await
                });
                let swept = swept.await?;
                self.purged.inc_by(swept.purged);
                self.removed.inc_by(swept.removed);
                changed += swept.purged + swept.removed;
            }
            if changed == 0 {
                return Ok(());
            }
        }
    }
}
