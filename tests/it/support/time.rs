//! Times in answers.

use std::time::{Duration, SystemTime};

use prost_types::Timestamp;
use uuid::Uuid;

/// What rounding to whole seconds may cost.
const TOLERANCE: Duration = Duration::from_secs(1);

/// The instant that a UUIDv7 holds.
pub fn time_in(id: &str) -> Timestamp {
    let id = Uuid::parse_str(id).expect("a UUID");
    assert_eq!(id.get_version_num(), 7);
    let (seconds, nanos) = id.get_timestamp().expect("a UUIDv7").to_unix();
    let (seconds, nanos) = (i64::try_from(seconds), i32::try_from(nanos));
    Timestamp { seconds: seconds.expect("soon"), nanos: nanos.expect("below a second") }
}

/// For comparing and reckoning.
pub fn system_time(time: Option<Timestamp>) -> SystemTime {
    SystemTime::try_from(time.expect("a time")).expect("a time of today")
}

/// The time is that of a call that was made after `begun` and is answered by now, plus
/// `ahead`.
#[track_caller]
pub fn assert_since(begun: SystemTime, ahead: Duration, time: Option<Timestamp>) {
    let (from, to) = (begun + ahead - TOLERANCE, SystemTime::now() + ahead);
    let time = system_time(time);
    assert!((from..=to).contains(&time), "{time:?} is not from {from:?} to {to:?}");
}
