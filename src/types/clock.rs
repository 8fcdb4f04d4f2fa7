//! The clock of a server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use time::{Duration, OffsetDateTime};

/// The clock by which a server decides whether something has expired, and stamps rows: that of the
/// database, as of the last reading.
///
/// Replicas share the rows and the database, but not a system clock. A replica that compared a
/// time in a row with its own clock would compare it with the clock of the replica that wrote it.
/// Between readings, monotonic time passes, so that a step of the system clock changes nothing.
///
/// Clones are the same clock. A new one starts with the time of the system clock.
#[derive(Clone, Debug)]
pub struct Clock(Arc<State>);

#[derive(Debug)]
struct State {
    created_at: Instant,
    /// What the clock showed at `created_at`, in microseconds since the Unix epoch.
    start: AtomicI64,
}

impl Default for Clock {
    fn default() -> Self {
        let state = State { created_at: Instant::now(), start: AtomicI64::new(system_micros()) };
        Self(Arc::new(state))
    }
}

impl Clock {
    /// Returns the current time in whole microseconds. PostgreSQL stores microseconds, so a time
    /// in a response equals the time that a later query returns.
    #[must_use]
    pub fn now(&self) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + Duration::microseconds(self.now_micros())
    }

    /// Returns the current time in microseconds since the Unix epoch, as the versions of todos
    /// have it.
    #[must_use]
    pub fn now_micros(&self) -> i64 {
        self.0.start.load(Ordering::Relaxed) + self.elapsed_micros()
    }

    /// Starts to read the clock that this one follows.
    #[must_use]
    pub fn start_reading(&self) -> ClockReading<'_> {
        ClockReading { clock: self, started_at: self.elapsed_micros() }
    }

    /// Corrects the start if it contradicts a reading.
    fn correct(&self, min: i64, max: i64) {
        let start = self.0.start.load(Ordering::Relaxed);
        if !(min..=max).contains(&start) {
            self.0.start.store(min.midpoint(max), Ordering::Relaxed);
        }
    }

    /// Returns how far the system clock is from this one.
    #[must_use]
    pub fn system_clock_error(&self) -> std::time::Duration {
        std::time::Duration::from_micros(self.now_micros().abs_diff(system_micros()))
    }

    fn elapsed_micros(&self) -> i64 {
        i64::try_from(self.0.created_at.elapsed().as_micros()).unwrap_or(i64::MAX)
    }
}

/// A reading of another clock in progress.
#[derive(Debug)]
pub struct ClockReading<'a> {
    clock: &'a Clock,
    started_at: i64,
}

impl ClockReading<'_> {
    /// Corrects the clock by the other one, which showed `micros` since the Unix epoch at some
    /// moment of the reading. The clock moves only if it contradicts that, so that a slow reading
    /// does not disturb it.
    pub fn finish(self, micros: i64) {
        let ended_at = self.clock.elapsed_micros();
        self.clock.correct(micros.saturating_sub(ended_at), micros.saturating_sub(self.started_at));
    }
}

/// Returns the time of the system clock in microseconds since the Unix epoch.
fn system_micros() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000;

    #[test]
    fn a_clock_follows_the_one_that_it_reads() {
        for offset in [-15 * SECOND, 0, 15 * SECOND] {
            let (clock, system) = (Clock::default(), Clock::default());
            clock.start_reading().finish(system_micros() + offset);
            let difference = clock.now() - system.now() - Duration::microseconds(offset);
            assert!(difference.abs() < Duration::SECOND, "{difference}");
            let error = clock.system_clock_error().as_secs_f64();
            assert!((error - Duration::microseconds(offset).abs().as_seconds_f64()).abs() < 1.0);
        }
    }

    #[test]
    fn a_clock_moves_only_if_it_contradicts_a_reading() {
        let clock = Clock::default();
        for (min, max, start) in [
            (9 * SECOND, 11 * SECOND, 10 * SECOND),
            // A slow reading that allows the start.
            (0, 20 * SECOND, 10 * SECOND),
            (10 * SECOND, 14 * SECOND, 10 * SECOND),
            (-3 * SECOND, -SECOND, -2 * SECOND),
        ] {
            clock.correct(min, max);
            assert_eq!(clock.0.start.load(Ordering::Relaxed), start);
        }
    }

    #[test]
    fn a_time_has_whole_microseconds() {
        assert_eq!(Clock::default().now().nanosecond() % 1_000, 0);
    }
}
