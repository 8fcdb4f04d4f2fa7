//! How late the scheduler of this machine runs tasks.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

/// How often the delay is sampled.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(5);

/// Handoffs from one task or process to another during a call. Each may be as late as the
/// sampled task.
const HANDOFFS_PER_CALL: u32 = 4;

/// Samples how late the runtime wakes a task, until it is dropped. A limit of a few
/// milliseconds must allow for this delay on a machine that runs all tests at once.
pub struct SchedulingDelay {
    max_micros: Arc<AtomicU64>,
    _sampler: AbortOnDropHandle<()>,
}

impl SchedulingDelay {
    pub fn measure() -> Self {
        let max_micros = Arc::<AtomicU64>::default();
        let max = max_micros.clone();
        let sampler = tokio::spawn(async move {
            loop {
                let due = Instant::now() + SAMPLE_INTERVAL;
                sleep_until(due).await;
                let delay = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX);
                max.fetch_max(delay, Ordering::Relaxed);
            }
        });
        Self { max_micros, _sampler: AbortOnDropHandle::new(sampler) }
    }

    /// Returns the largest delay that a call may have had so far.
    pub fn per_call(&self) -> Duration {
        HANDOFFS_PER_CALL * Duration::from_micros(self.max_micros.load(Ordering::Relaxed))
    }
}
