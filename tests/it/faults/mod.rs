//! Failures of the database, of clients and of processes.

mod cancellation;
#[cfg(feature = "embedded")]
mod durability;
mod outages;
mod recovery;
mod replicas;
