//! Detects operations that take too long, without a timer for each.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::sleep;

/// How long a client may take to read a response: at least this, at most twice this. Then its
/// connection drains: otherwise a few slow readers would hold all memory.
///
/// Test: `a_stalled_connection_drains_its_other_calls_before_it_closes`.
pub(crate) const RESPONSE_READ_TIMEOUT: Duration = Duration::from_secs(5);

/// Detects operations that outlive a period. It counts their starts in two alternating epochs,
/// so it needs no timer per operation, and reports one after one to two periods.
#[derive(Debug)]
pub(crate) struct StallDetector {
    period: Duration,
    /// Operations in progress, by the epoch of their start.
    counts: [AtomicUsize; 2],
    epoch: AtomicUsize,
}

impl StallDetector {
    /// Creates a detector without operations.
    #[must_use]
    pub(super) fn new(period: Duration) -> Arc<Self> {
        Arc::new(Self { period, counts: <_>::default(), epoch: <_>::default() })
    }

    /// Waits until an operation outlives the period.
    pub(super) async fn expired(&self) {
        loop {
            sleep(self.period).await;
            let next = (self.epoch.load(Ordering::Relaxed) + 1) % self.counts.len();
            if self.counts[next].load(Ordering::Relaxed) > 0 {
                return;
            }
            self.epoch.store(next, Ordering::Relaxed);
        }
    }

    /// Tracks an operation until the guard is dropped.
    pub(super) fn track(self: &Arc<Self>) -> StallGuard {
        let epoch = self.epoch.load(Ordering::Relaxed);
        self.counts[epoch].fetch_add(1, Ordering::Relaxed);
        StallGuard { detector: self.clone(), epoch }
    }
}

/// An operation in progress.
#[derive(Debug)]
pub(crate) struct StallGuard {
    detector: Arc<StallDetector>,
    epoch: usize,
}

impl Drop for StallGuard {
    fn drop(&mut self) {
        self.detector.counts[self.epoch].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_response_may_take_one_to_two_timeouts_to_be_read() {
        let detector = StallDetector::new(RESPONSE_READ_TIMEOUT);
        let expired = detector.expired();
        tokio::pin!(expired);
        // Responses that are read in time, however many, and whenever they start.
        for _ in 0..20 {
            let response = detector.track();
            let period = RESPONSE_READ_TIMEOUT.mul_f64(0.9);
            assert!(timeout(period, expired.as_mut()).await.is_err());
            drop(response);
        }
        let start = Instant::now();
        let _response = detector.track();
        expired.await;
        assert!((RESPONSE_READ_TIMEOUT..=RESPONSE_READ_TIMEOUT * 2).contains(&start.elapsed()));
    }
}
