//! Failures of the database, of clients and of processes.

mod cancellation;
#[cfg(target_os = "linux")]
mod clocks;
#[cfg(feature = "embedded")]
mod durability;
mod outages;
mod recovery;
mod replicas;
