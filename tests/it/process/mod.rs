//! The binary: settings, startup, shutdown, TLS and the embedded PostgreSQL.

mod connection;
mod dotenv;
#[cfg(feature = "embedded")]
mod embedded;
mod lifecycle;
mod roles;
mod settings;
mod shutdown;
mod startup;
mod tls;
mod user_command;
