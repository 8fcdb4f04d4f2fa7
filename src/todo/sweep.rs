//! The sweep of deleted todos: every replica purges the content of old ones, and removes the
//! tombstones of older ones.

use std::time::Duration;

use tokio::time::sleep;

use super::{
    TOMBSTONE_RETENTION_MICROS, content_cutoff,
    store::sweep::{self, Cutoffs},
};
use crate::{
    database::Database,
    rpc::error::Error,
    telemetry::metrics::Counter,
    types::{error_chain::ErrorChain, id::UserId, jitter::with_jitter},
};

/// The interval between two sweeps of a replica. While a replica runs, the database contains a
/// deleted todo for at most that long after its purge time.
const SWEEP_INTERVAL: Duration = Duration::from_hours(1);

/// The backoff after a failed sweep. It doubles with each further one, up to [`SWEEP_INTERVAL`].
const FIRST_BACKOFF: Duration = Duration::from_mins(1);

/// Sweeps the deleted todos of all owners.
#[derive(Debug)]
pub(crate) struct TrashSweeper {
    pub(crate) database: Database,
    /// Counts the todos whose content is purged.
    pub(crate) purged: Counter,
    /// Counts the tombstones that are removed.
    pub(crate) removed: Counter,
}

/// Why a sweep has left something.
#[derive(Debug)]
struct SweepError {
    /// The number of owners whose sweep failed.
    failed_owners: usize,
    /// The first error.
    error: Error,
}

impl TrashSweeper {
    /// Sweeps at once and then at each interval, until the future is dropped.
    pub(crate) async fn run(self) {
        let mut failures = 0;
        loop {
            failures = match self.sweep(self.database.clock().now_micros()).await {
                Ok(()) => 0,
                Err(SweepError { failed_owners, error }) => {
                    let error = error.into_source();
                    let error = ErrorChain(&*error);
                    tracing::warn!(failed_owners, error = %error, "failed to sweep deleted todos");
                    failures + 1
                }
            };
            sleep(with_jitter(pause_after(failures))).await;
        }
    }

    /// Sweeps until nothing is left to do, or other replicas do it. The failure of one owner does
    /// not delay the others. `now` is in microseconds since 1970.
    async fn sweep(&self, now: i64) -> Result<(), SweepError> {
        let cutoffs =
            Cutoffs { content: content_cutoff(now), tombstone: now - TOMBSTONE_RETENTION_MICROS };
        let mut failed: Option<SweepError> = None;
        let mut position = i64::MIN;
        loop {
            let due = self
                .database
                .run(async |connection| sweep::find_due(connection, cutoffs, position).await);
            let due = due.await.map_err(|error| SweepError { failed_owners: 0, error })?;
            for owner_id in due.owner_ids {
                match (self.sweep_owner(owner_id, cutoffs).await, &mut failed) {
                    (Ok(()), _) => {}
                    // The sweeps of all others would fail, too.
                    (Err(error @ Error::DatabaseUnavailable(_)), _) => {
                        return Err(SweepError { failed_owners: 0, error });
                    }
                    (Err(_), Some(failed)) => failed.failed_owners += 1,
                    (Err(error), failed) => *failed = Some(SweepError { failed_owners: 1, error }),
                }
            }
            match due.next {
                Some(next) => position = next,
                None => return failed.map_or(Ok(()), Err),
            }
        }
    }

    /// Sweeps the deleted todos of an owner, in several statements if there are many.
    async fn sweep_owner(&self, owner_id: UserId, cutoffs: Cutoffs) -> Result<(), Error> {
        loop {
            let swept = self
                .database
                .run(async |connection| sweep::sweep_owner(connection, owner_id, cutoffs).await)
                .await?;
            self.purged.inc_by(swept.purged);
            self.removed.inc_by(swept.removed);
            if !swept.is_full {
                return Ok(());
            }
        }
    }
}

/// Returns the time until the next sweep, after this number of failed ones in a row.
fn pause_after(failures: u32) -> Duration {
    match failures.checked_sub(1) {
        None => SWEEP_INTERVAL,
        Some(doublings) => {
            FIRST_BACKOFF.saturating_mul(2_u32.saturating_pow(doublings)).min(SWEEP_INTERVAL)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_sweep_is_repeated_after_a_minute_and_then_less_often() {
        let minutes =
            [0, 1, 2, 3, 6, 7, u32::MAX].map(|failures| pause_after(failures).as_secs() / 60);
        assert_eq!(minutes, [60, 1, 2, 4, 32, 60, 60]);
    }
}
