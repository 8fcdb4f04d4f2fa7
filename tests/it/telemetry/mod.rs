//! Metrics, traces and the log of connections.

mod connection_failures;
mod metrics;
mod traces;
