//! The metrics of the watches of todos.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

/// The upper bounds of the lag, in seconds: from a write on the same replica to an outage.
const LAG_BUCKETS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 30.0];

/// The upper bounds of the duration of a poll, in seconds.
const POLL_BUCKETS: [f64; 10] = [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.1, 0.5, 1.0, 5.0];

/// The metrics of watches.
#[derive(Clone, Debug)]
pub(crate) struct WatchMetrics {
    /// Open watches.
    pub(crate) open: Gauge,
    /// Changes that watches have sent.
    pub(crate) changes: Counter,
    /// From a change to its message, in seconds.
    pub(crate) lag: Histogram,
    /// The duration of the polls of the clocks, in seconds.
    pub(crate) poll_duration: Histogram,
}

impl Default for WatchMetrics {
    fn default() -> Self {
        Self {
            open: Gauge::default(),
            changes: Counter::default(),
            lag: Histogram::new(LAG_BUCKETS),
            poll_duration: Histogram::new(POLL_BUCKETS),
        }
    }
}

impl WatchMetrics {
    /// Adds the metrics to a registry.
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("watches", "Open watches of todos", metrics.open.clone());
        let help = "Changes of todos that watches have sent";
        registry.register("watch_changes", help, metrics.changes.clone());
        let help = "Time from a change of a todo to its message in a watch that had caught up";
        registry.register_with_unit("watch_lag", help, Unit::Seconds, metrics.lag.clone());
        let help = "Duration of the polls for changes of watched todos";
        let poll_duration = metrics.poll_duration.clone();
        registry.register_with_unit("watch_poll_duration", help, Unit::Seconds, poll_duration);
        metrics
    }
}
