//! What the server reports about itself: log, metrics, traces, audit trail and health.
//!
//! The other modules get handles (counters, spans) from here; only `server` knows where they
//! go. Nothing here knows the services, the database or the settings: `server` passes values
//! and functions in.

pub(crate) mod admin;
pub(crate) mod audit;
pub(crate) mod health;
pub(crate) mod log;
pub(crate) mod metrics;
pub(crate) mod traces;
