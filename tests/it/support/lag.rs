//! How late this machine is.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;

/// How often it is looked at.
const INTERVAL: Duration = Duration::from_millis(5);

/// Hands from one task or process to another on the way of a call and back: each may be as
/// late as the one that is measured.
const HANDS: u32 = 4;

/// Measures by how much a task is woken too late, as long as it lives: what a promise of so
/// many milliseconds cannot be blamed for, on a machine that runs all tests at once.
pub struct Lag {
    micros: Arc<AtomicU64>,
    _measuring: AbortOnDropHandle<()>,
}

impl Lag {
    pub fn measure() -> Self {
        let micros = Arc::<AtomicU64>::default();
        let most = micros.clone();
        let measuring = tokio::spawn(async move {
            loop {
                let due = Instant::now() + INTERVAL;
                sleep_until(due).await;
                let late = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX);
                most.fetch_max(late, Ordering::Relaxed);
            }
        });
        Self { micros, _measuring: AbortOnDropHandle::new(measuring) }
    }

    /// By how much a call may have been late for it.
    pub fn of_a_call(&self) -> Duration {
        HANDS * Duration::from_micros(self.micros.load(Ordering::Relaxed))
    }
}
