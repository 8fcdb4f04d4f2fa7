//! The lags of watches: the times from the starts of writes to the messages that contain them.

use std::{
    collections::{HashMap, VecDeque},
    time::Instant,
};

use fast_zero::proto::todo::v1::Todo;
use hdrhistogram::Histogram;

use crate::{
    error::Result,
    load::{latency_histogram, record_latency},
};

/// A successful write to a watched todo.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    /// The number of the owner.
    pub owner: usize,
    pub version: i64,
    pub scheduled_at: Instant,
}

/// A message of a watch with at least one change.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// The number of the replica that serves the watch.
    pub replica: usize,
    /// The number of the owner.
    pub owner: usize,
    /// The greatest version in the message.
    pub version: i64,
    pub at: Instant,
}

/// The lags on each replica, and the writes whose messages have not arrived.
#[derive(Debug)]
pub struct Lags {
    /// Those of each replica, in nanoseconds.
    pub latencies: Vec<Histogram<u64>>,
    /// By replica and owner, in ascending order of versions.
    pending: HashMap<(usize, usize), VecDeque<Write>>,
}

impl Lags {
    /// Expects a message of each replica for each of the writes.
    pub fn new(replica_count: usize, mut writes: Vec<Write>) -> Result<Self> {
        writes.sort_by_key(|write| write.version);
        let mut pending = HashMap::<_, VecDeque<_>>::new();
        for replica in 0..replica_count {
            for write in &writes {
                pending.entry((replica, write.owner)).or_default().push_back(*write);
            }
        }
        let latencies =
            (0..replica_count).map(|_| latency_histogram()).collect::<Result<Vec<_>>>()?;
        Ok(Self { latencies, pending })
    }

    /// Records the lags of the writes that a message contains.
    ///
    /// A watch sends changes in the order of their versions, and may skip all states of a todo but
    /// the last one. So the message contains the owner's writes up to its version.
    pub fn record(&mut self, arrival: &Arrival) {
        let key = (arrival.replica, arrival.owner);
        let Some(writes) = self.pending.get_mut(&key) else {
            return;
        };
        while let Some(write) = writes.pop_front_if(|write| write.version <= arrival.version) {
            let lag = arrival.at.saturating_duration_since(write.scheduled_at);
            record_latency(&mut self.latencies[arrival.replica], lag);
        }
        if writes.is_empty() {
            self.pending.remove(&key);
        }
    }

    /// Returns the number of messages that have not arrived.
    pub fn pending_count(&self) -> usize {
        self.pending.values().map(VecDeque::len).sum()
    }

    /// Returns `true` if the messages of all writes have arrived.
    pub fn is_complete(&self) -> bool {
        self.pending.is_empty()
    }
}

/// Returns the version of a todo: its update time, in microseconds since 1970.
pub fn version(todo: &Todo) -> i64 {
    let time = todo.update_time.unwrap_or_default();
    time.seconds * 1_000_000 + i64::from(time.nanos / 1_000)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::load::quantile_seconds;

    #[test]
    fn a_message_contains_the_writes_of_its_owner_up_to_its_version() {
        let start = Instant::now();
        let after = |milliseconds| start + Duration::from_millis(milliseconds);
        let write =
            |owner, version| Write { owner, version, scheduled_at: after(version.cast_unsigned()) };
        let writes = vec![write(0, 30), write(0, 10), write(0, 20), write(1, 15)];
        let mut lags = Lags::new(2, writes).expect("histograms");
        let mut arrive = |replica, owner, version, at| {
            lags.record(&Arrival { replica, owner, version, at: after(at) });
            lags.pending_count()
        };
        assert_eq!(arrive(0, 0, 9, 40), 8, "a message of an earlier write");
        assert_eq!(arrive(0, 0, 20, 120), 6, "two writes in one message");
        assert_eq!(arrive(0, 2, 99, 120), 6, "an owner without writes");
        assert_eq!(arrive(0, 0, 30, 130), 5);
        assert_eq!(arrive(0, 1, 15, 115), 4);
        assert_eq!(arrive(1, 0, 30, 1_030), 1);
        assert!(!lags.is_complete());
        lags.record(&Arrival { replica: 1, owner: 1, version: 15, at: after(1_015) });
        assert!(lags.is_complete());
        let quantiles = [0, 1].map(|replica| quantile_seconds(&lags.latencies[replica], 0.5));
        assert!((quantiles[0] - 0.1).abs() < 0.001, "{quantiles:?}");
        assert!((quantiles[1] - 1.0).abs() < 0.011, "{quantiles:?}");
        assert_eq!(lags.latencies[0].len(), 4);
    }
}
