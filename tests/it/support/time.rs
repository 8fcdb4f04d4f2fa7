//! Times in responses.

use std::time::{Duration, SystemTime};

use prost_types::Timestamp;
use uuid::Uuid;

/// The error of rounding to whole seconds, and that of a reading of the database's clock: up to half
/// a round trip, which is long on a machine that runs all tests at once.
const TOLERANCE: Duration = Duration::from_secs(1);

/// Returns the time in a UUIDv7.
pub fn uuid_timestamp(id: &str) -> Timestamp {
    let id = Uuid::parse_str(id).expect("a UUID");
    assert_eq!(id.get_version_num(), 7);
    let (seconds, nanos) = id.get_timestamp().expect("a UUIDv7").to_unix();
    let (seconds, nanos) = (i64::try_from(seconds), i32::try_from(nanos));
    Timestamp { seconds: seconds.expect("in range"), nanos: nanos.expect("below a second") }
}

/// Converts the time, so that tests can compare it and add to it.
pub fn to_system_time(time: Option<Timestamp>) -> SystemTime {
    SystemTime::try_from(time.expect("a time")).expect("in range")
}

/// Asserts that the time lies between `started_at` and now, each plus `offset`, with a
/// tolerance.
#[track_caller]
pub fn assert_recent(started_at: SystemTime, offset: Duration, time: Option<Timestamp>) {
    let (from, to) = (started_at + offset - TOLERANCE, SystemTime::now() + offset + TOLERANCE);
    let time = to_system_time(time);
    assert!((from..=to).contains(&time), "{time:?} is not from {from:?} to {to:?}");
}
