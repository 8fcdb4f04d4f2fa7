//! The settings, in sections. Each is a flag, and an environment variable of the same name.
//!
//! A flag comes before the environment, and the environment before a `.env` file in the working
//! directory ([`dotenv`]). Secrets may come from files ([`secrets`]). What a subcommand does not
//! need, it does not show.

pub(crate) mod dotenv;
mod hashing_threads;
mod limits;
mod secrets;
mod tls;
mod tokens;
mod values;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use http::Uri;
use ipnet::IpNet;
use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgConnectOptions;
use tracing_subscriber::filter::Targets;

use self::{
    secrets::{load_secret, parse_database_url},
    values::{parse_address, parse_log_levels, parse_network, parse_otlp_endpoint, secret},
};
use crate::{telemetry::log::LogFormat, transport::tls::TlsFileError};

pub(crate) use self::values::connect_addr;
pub use self::{limits::LimitConfig, tls::TlsConfig, tokens::TokenConfig};

/// The longest wait at startup or shutdown, in seconds: an hour.
///
/// Test: `settings_are_rejected_above_their_maximum`.
const MAX_WAIT_SECONDS: i64 = 3_600;

/// All settings of the server.
#[derive(Clone, Debug, Args)]
pub struct Config {
    /// Addresses.
    #[command(flatten)]
    pub listen: ListenConfig,
    /// TLS.
    #[command(flatten)]
    pub tls: TlsConfig,
    /// The database.
    #[command(flatten)]
    pub database: DatabaseConfig,
    /// Keys and tokens.
    #[command(flatten)]
    pub tokens: TokenConfig,
    /// Limits.
    #[command(flatten)]
    pub limits: LimitConfig,
    /// Startup and shutdown.
    #[command(flatten)]
    pub lifecycle: LifecycleConfig,
    /// The log.
    #[command(flatten)]
    pub log: LogConfig,
}

/// The address of the gRPC server, which its clients need, too.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Addresses")]
pub struct GrpcAddrConfig {
    /// Address of the gRPC server
    #[arg(long, env, default_value = "127.0.0.1:50051", value_parser = parse_address)]
    pub listen_addr: SocketAddr,
}

/// The addresses of the server.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Addresses")]
pub struct ListenConfig {
    /// The gRPC server.
    #[command(flatten)]
    pub grpc: GrpcAddrConfig,

    /// Address of the admin server (metrics and probes), in plain HTTP/1.1 [default: none]
    #[arg(long, env, value_parser = parse_address)]
    pub metrics_addr: Option<SocketAddr>,

    /// OpenTelemetry collector that receives traces over OTLP with gRPC, http://host:4317 [default: none]
    #[arg(long, env, value_parser = parse_otlp_endpoint)]
    pub otel_exporter_otlp_endpoint: Option<Uri>,

    /// Serve gRPC server reflection
    #[arg(long, env, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub reflection: bool,

    /// Proxies whose x-forwarded-for is trusted: networks, 10.0.0.0/8,fd00::/8 [default: none]
    #[arg(long, env, value_delimiter = ',', value_parser = parse_network)]
    pub trusted_proxies: Vec<IpNet>,
}

/// The database.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Database")]
pub struct DatabaseConfig {
    /// PostgreSQL URL, postgresql://user:password@host/database [default: embedded PostgreSQL]
    #[arg(long, env, hide_env_values = true, value_parser = secret())]
    pub database_url: Option<SecretString>,

    /// File that contains DATABASE_URL
    #[arg(long, env)]
    pub database_url_file: Option<PathBuf>,

    /// Data directory of the embedded PostgreSQL [default: the user's data directory]
    #[arg(long, env)]
    pub fastzero_data_dir: Option<PathBuf>,

    /// How long to wait for the database at startup, in seconds
    #[arg(long, env, default_value_t = 60, value_parser = clap::value_parser!(u32).range(0..=MAX_WAIT_SECONDS))]
    pub database_wait_seconds: u32,
}

/// Startup and shutdown.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Startup and shutdown")]
pub struct LifecycleConfig {
    /// Apply schema migrations at startup
    #[arg(long, env, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub migrate_on_start: bool,

    /// How long a shutdown serves on while health is NOT_SERVING, in seconds, until load balancers have seen it
    #[arg(long, env, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=MAX_WAIT_SECONDS))]
    pub shutdown_delay_seconds: u32,

    /// Grace period of calls in flight at shutdown, in seconds
    #[arg(long, env, default_value_t = 8, value_parser = clap::value_parser!(u32).range(0..=MAX_WAIT_SECONDS))]
    pub shutdown_grace_seconds: u32,
}

/// The log.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Log")]
pub struct LogConfig {
    /// Log level: error, warn, info, debug, trace or off, for all or by module, warn,fast_zero=debug
    #[arg(long, env, default_value = "info", value_parser = parse_log_levels)]
    pub rust_log: Targets,

    /// Log format [default: pretty on a terminal, otherwise json]
    #[arg(long, env)]
    pub log_format: Option<LogFormat>,
}

/// A setting that cannot be used. The message never contains a secret.
#[derive(Debug, thiserror::Error)]
#[error("{setting} {message}")]
pub struct ConfigError {
    setting: &'static str,
    message: String,
}

impl From<TlsFileError> for ConfigError {
    fn from(error: TlsFileError) -> Self {
        Self { setting: error.setting, message: error.message }
    }
}

impl ConfigError {
    /// Creates the error of a setting that is required without the embedded PostgreSQL.
    pub(crate) fn missing(setting: &'static str) -> Self {
        let message = match setting {
            "SECRET_KEY" => {
                "must be set to at least 32 random bytes: `openssl rand -base64 32` generates some"
            }
            _ => "must be set: this binary is built without the embedded PostgreSQL",
        };
        Self { setting, message: message.to_owned() }
    }

    /// Creates the error of a setting that another one requires.
    fn requires(setting: &'static str, other: &str) -> Self {
        Self { setting, message: format!("must be set if {other} is set") }
    }
}

impl Config {
    /// Checks everything that can be checked before anything starts, and reads the files of
    /// secrets.
    pub(crate) fn validate(&mut self) -> Result<(), ConfigError> {
        self.database.load_secrets()?;
        self.tokens.load_secrets()?;
        self.tokens.check_lifetime()?;
        let has_database = self.database.connect_options()?.is_some();
        if self.tokens.keyring()?.is_none() && has_database {
            return Err(ConfigError::missing("SECRET_KEY"));
        }
        self.tls.load()?;
        self.listen.checked_metrics_addr()?;
        Ok(())
    }
}

impl DatabaseConfig {
    /// Reads the files of secrets, each once.
    pub(crate) fn load_secrets(&mut self) -> Result<(), ConfigError> {
        load_secret("DATABASE_URL", &mut self.database_url, &mut self.database_url_file)
    }

    /// Returns how to connect to the database; `None` for the embedded one.
    pub(crate) fn connect_options(&self) -> Result<Option<PgConnectOptions>, ConfigError> {
        let url = self.database_url.as_ref();
        url.map(|url| parse_database_url(url.expose_secret())).transpose()
    }

    /// Returns how to connect to the database, which has to be configured.
    pub(crate) fn required_options(&self) -> Result<PgConnectOptions, ConfigError> {
        self.connect_options()?.ok_or_else(|| ConfigError::missing("DATABASE_URL"))
    }

    /// Returns how long to wait for the database at startup.
    pub(crate) fn wait(&self) -> Duration {
        Duration::from_secs(self.database_wait_seconds.into())
    }
}

impl ListenConfig {
    /// Returns the address of the admin server, if there is to be one.
    pub(crate) fn checked_metrics_addr(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let grpc = self.grpc.listen_addr;
        let is_taken = |address: &SocketAddr| {
            let is_same_ip = address.ip() == grpc.ip()
                || address.ip().is_unspecified()
                || grpc.ip().is_unspecified();
            is_same_ip && address.port() == grpc.port() && grpc.port() != 0
        };
        if self.metrics_addr.as_ref().is_some_and(is_taken) {
            let message = format!("must have another port than LISTEN_ADDR, {grpc}");
            return Err(ConfigError { setting: "METRICS_ADDR", message });
        }
        Ok(self.metrics_addr)
    }
}

impl LifecycleConfig {
    /// Returns how long a shutdown keeps serving.
    pub(crate) fn shutdown_delay(&self) -> Duration {
        Duration::from_secs(self.shutdown_delay_seconds.into())
    }

    /// Returns how long calls in flight may take after that.
    pub(crate) fn shutdown_grace(&self) -> Duration {
        Duration::from_secs(self.shutdown_grace_seconds.into())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Arguments {
        #[command(flatten)]
        _config: Config,
    }

    #[test]
    fn settings_are_rejected_above_their_maximum() {
        for (flag, max) in [
            ("--access-token-expire-minutes", 525_600),
            ("--refresh-token-expire-days", 3_650),
            ("--hashing-threads", 1_024),
            ("--database-max-connections", 1_000),
            ("--max-connections", 100_000),
            ("--max-connections-per-peer", 100_000),
            ("--max-watches", 100_000),
            ("--max-watches-per-peer", 100_000),
            ("--connection-idle-seconds", 86_400),
            ("--connection-max-age-seconds", 86_400),
            ("--database-wait-seconds", 3_600),
            ("--shutdown-delay-seconds", 3_600),
            ("--shutdown-grace-seconds", 3_600),
        ] {
            let parse = |value: u32| Arguments::try_parse_from(["test", flag, &value.to_string()]);
            assert!(parse(max).is_ok(), "{flag} {max}");
            assert!(parse(max + 1).is_err(), "{flag} above {max}");
        }
    }
}
