//! The code that `build.rs` generates from `proto/`, and the conversions that all services
//! need.

#![expect(
    clippy::default_trait_access,
    clippy::doc_lazy_continuation,
    clippy::must_use_candidate,
    clippy::too_many_lines,
    missing_docs,
    reason = "generated code; proto/ documents it"
)]

use time::OffsetDateTime;

include!(concat!(env!("OUT_DIR"), "/proto.rs"));
pub use fastzero::*;

/// The encoded `google.protobuf.FileDescriptorSet` of all of `proto/`, with imports, comments
/// and custom options.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Converts a time to protobuf.
pub(crate) fn to_timestamp(time: OffsetDateTime) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.unix_timestamp(),
        nanos: i32::try_from(time.nanosecond()).unwrap_or_default(),
    }
}

/// Converts a time from protobuf, and cuts it to whole microseconds, as PostgreSQL stores it.
/// Returns `None` if it is not within the years 1 to 9999, which `google.protobuf.Timestamp`
/// requires.
pub(crate) fn from_timestamp(timestamp: prost_types::Timestamp) -> Option<OffsetDateTime> {
    let time = OffsetDateTime::from_unix_timestamp(timestamp.seconds).ok()?;
    let nanos = u32::try_from(timestamp.nanos).ok()?;
    (1..=9999).contains(&time.year()).then_some(())?;
    time.replace_nanosecond(nanos / 1_000 * 1_000).ok()
}

/// Converts a time in microseconds since 1970 to protobuf.
pub(crate) fn micros_to_timestamp(micros: i64) -> prost_types::Timestamp {
    const MICROS_PER_SECOND: i64 = 1_000_000;
    prost_types::Timestamp {
        seconds: micros.div_euclid(MICROS_PER_SECOND),
        nanos: i32::try_from(micros.rem_euclid(MICROS_PER_SECOND) * 1_000).unwrap_or_default(),
    }
}
