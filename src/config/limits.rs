//! The limits that an operator can set.

use std::time::Duration;

use clap::Args;

use super::{
    hashing_threads::{default_hashing_threads, max_hashing_threads, memory_limit},
    values::default_max_connections,
};
use crate::transport::{accept::ConnectionLimits, connection::Lifetime};

/// The maximum number of hashing threads: well above the cores of a machine.
///
/// Test: `settings_are_rejected_above_their_maximum`.
const MAX_HASHING_THREADS: i64 = 1_024;

/// The maximum number of connections to the database: well above what one PostgreSQL serves well.
///
/// Test: `settings_are_rejected_above_their_maximum`.
const MAX_DATABASE_CONNECTIONS: i64 = 1_000;

/// The maximum number of open connections: more than the ports of one address.
///
/// Test: `settings_are_rejected_above_their_maximum`.
const MAX_CONNECTIONS: i64 = 100_000;

/// The maximum number of open watches of todos: a poll names all of their owners.
///
/// Test: `settings_are_rejected_above_their_maximum`.
const MAX_WATCHES: i64 = 100_000;

/// The longest lifetime of a connection, in seconds: a day.
///
/// Test: `settings_are_rejected_above_their_maximum`.
const MAX_CONNECTION_SECONDS: i64 = 86_400;

/// The limits of the server.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitConfig {
    /// Calls in flight; as many wait for up to half a second, further ones are shed
    #[arg(long, env, default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_concurrent_calls: u16,

    /// Open connections
    #[arg(long, env, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    pub max_connections: u32,

    /// Open connections per client IP address (IPv6: per /64)
    #[arg(long, env, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    pub max_connections_per_peer: u32,

    /// Idle timeout of a connection, in seconds
    #[arg(long, env, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTION_SECONDS))]
    pub connection_idle_seconds: u32,

    /// Maximum age of a connection, with a jitter of a tenth, in seconds
    #[arg(long, env, default_value_t = 1_800, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTION_SECONDS))]
    pub connection_max_age_seconds: u32,

    /// Open watches of todos
    #[arg(long, env, default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(1..=MAX_WATCHES))]
    pub max_watches: u32,

    /// Open watches of todos per client IP address (IPv6: per /64)
    #[arg(long, env, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=MAX_WATCHES))]
    pub max_watches_per_peer: u32,

    /// Open watches of todos per user
    #[arg(long, env, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_watches_per_user: u16,

    /// Sign-ups, and rejected changes of a username or email, per client IP address (IPv6: per /64) and minute
    #[arg(long, env, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub sign_ups_per_peer_per_minute: u32,

    /// Password hashing threads, 19 MiB each, at most a quarter of the container's memory
    #[arg(long, env, default_value_t = default_hashing_threads(), value_parser = clap::value_parser!(u16).range(1..=MAX_HASHING_THREADS))]
    pub hashing_threads: u16,

    /// Connections to the database
    #[arg(long, env, default_value_t = default_max_connections(), value_parser = clap::value_parser!(u16).range(1..=MAX_DATABASE_CONNECTIONS))]
    pub database_max_connections: u16,

    /// Batch concurrent queries of the same kind into one statement
    #[arg(long, env, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub coalescing: bool,
}

impl LimitConfig {
    /// Returns the number of hashing threads. A larger setting than the memory limit of the
    /// container permits would let the kernel kill the process, so it is reduced.
    pub(crate) fn hashing_threads(&self) -> usize {
        let (configured, memory_limit) = (self.hashing_threads, memory_limit());
        let threads = configured.min(max_hashing_threads(memory_limit));
        if threads < configured {
            tracing::warn!(
                configured,
                threads,
                memory_limit_bytes = memory_limit,
                "too many hashing threads for the memory"
            );
        }
        threads.into()
    }

    /// Returns the limits of connections.
    pub(crate) fn connections(&self) -> ConnectionLimits {
        ConnectionLimits {
            max_connections: self.max_connections as usize,
            lifetime: Lifetime {
                max_age: Duration::from_secs(self.connection_max_age_seconds.into()),
                idle_timeout: Duration::from_secs(self.connection_idle_seconds.into()),
            },
        }
    }
}
