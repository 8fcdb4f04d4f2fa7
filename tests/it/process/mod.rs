//! The binary: settings, startup, shutdown, TLS and the embedded PostgreSQL.

mod connection;
#[cfg(feature = "embedded")]
mod embedded;
mod lifecycle;
mod settings;
mod shutdown;
mod startup;
mod tls;
