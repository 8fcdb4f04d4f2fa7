//! The system clock, read in one place and passed on as a value.

use time::OffsetDateTime;

/// Returns the current time in whole microseconds. PostgreSQL stores microseconds, so a
/// time in a response equals the time that a later query returns.
#[must_use]
pub fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now - time::Duration::nanoseconds(i64::from(now.nanosecond() % 1_000))
}

/// Returns a time in microseconds since 1970, as the versions of todos have it.
#[must_use]
pub fn to_micros(time: OffsetDateTime) -> i64 {
    i64::try_from(time.unix_timestamp_nanos().div_euclid(1_000)).unwrap_or(i64::MAX)
}
