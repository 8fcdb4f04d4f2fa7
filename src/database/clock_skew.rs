//! The difference between the clock of this host and that of the database.

use std::time::{Duration, Instant};

/// The maximum difference without a warning, in microseconds. Versions of todos are times, so the
/// clocks of all replicas should agree with the one clock that they share.
///
/// Test: `a_difference_of_more_than_5_seconds_is_warned_of_every_10_minutes`.
const MAX_CLOCK_SKEW_MICROS: i64 = 5_000_000;

/// The interval between two warnings.
const WARNING_INTERVAL: Duration = Duration::from_mins(10);

/// Warns if the clocks differ.
#[derive(Debug, Default)]
pub(super) struct ClockSkew {
    warned_at: Option<Instant>,
}

/// A reading of the clock of the database, and of the clock of this host before and after it, in
/// microseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClockReading {
    pub(super) before: i64,
    pub(super) database: i64,
    pub(super) after: i64,
}

impl ClockReading {
    /// Returns by how much the clock of the database is ahead, at least.
    fn skew(self) -> i64 {
        self.database - self.database.clamp(self.before, self.after.max(self.before))
    }
}

impl ClockSkew {
    /// Logs a warning if the clocks differ too much, but not for each reading.
    pub(super) fn check(&mut self, reading: ClockReading) {
        if let Some(skew) = self.warn(reading, Instant::now()) {
            tracing::warn!(
                database_ahead_ms = skew / 1_000,
                hint = "synchronize the clocks of this host and of the database",
                "clock differs from that of the database"
            );
        }
    }

    /// Returns the difference if a warning is due.
    fn warn(&mut self, reading: ClockReading, now: Instant) -> Option<i64> {
        let skew = reading.skew();
        if skew.abs() <= MAX_CLOCK_SKEW_MICROS {
            self.warned_at = None;
            return None;
        }
        if self.warned_at.is_some_and(|warned_at| now - warned_at < WARNING_INTERVAL) {
            return None;
        }
        self.warned_at = Some(now);
        Some(skew)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    fn reading(before: i64, database: i64, after: i64) -> ClockReading {
        ClockReading { before: before * SECOND, database: database * SECOND, after: after * SECOND }
    }

    #[test]
    fn a_slow_reading_is_no_difference() {
        for (before, database, after, skew) in
            [(10, 10, 10, 0), (10, 15, 30, 0), (10, 31, 30, 1), (10, 4, 30, -6), (10, 4, 9, -6)]
        {
            assert_eq!(reading(before, database, after).skew(), skew * SECOND);
        }
    }

    #[test]
    fn a_difference_of_more_than_5_seconds_is_warned_of_every_10_minutes() {
        let (mut clock, start) = (ClockSkew::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(clock.warn(reading(10, 15, 10), at(0)), None);
        assert_eq!(clock.warn(reading(10, 16, 10), at(1)), Some(6 * SECOND));
        assert_eq!(clock.warn(reading(10, 16, 10), at(2)), None);
        assert_eq!(clock.warn(reading(10, 4, 10), at(600)), None);
        assert_eq!(clock.warn(reading(10, 4, 10), at(601)), Some(-6 * SECOND));
        assert_eq!(clock.warn(reading(10, 10, 10), at(602)), None);
        assert_eq!(clock.warn(reading(10, 16, 10), at(603)), Some(6 * SECOND));
    }
}
