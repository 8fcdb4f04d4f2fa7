//! The contract as Rust: what `build.rs` made of `proto/`, and the conversions that
//! all services need.

#![expect(
    clippy::default_trait_access,
    clippy::must_use_candidate,
    clippy::too_many_lines,
    missing_docs,
    reason = "generated code; its documentation is the contract's"
)]

use time::OffsetDateTime;

include!(concat!(env!("OUT_DIR"), "/proto.rs"));
pub use fastzero::*;

/// The descriptors of all of `proto/`: a serialised `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// A time as callers see it.
pub(crate) fn timestamp(time: OffsetDateTime) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.unix_timestamp(),
        nanos: i32::try_from(time.nanosecond()).unwrap_or_default(),
    }
}
