//! The time of day, read in one place and passed on as a value.

use time::OffsetDateTime;

/// Now, in whole microseconds: what PostgreSQL keeps, so that a time that was
/// answered equals the one that is read later.
#[must_use]
pub fn now() -> OffsetDateTime {
    let now = OffsetDateTime::now_utc();
    now - time::Duration::nanoseconds(i64::from(now.nanosecond() % 1_000))
}
