//! The settings: from flags, the environment and `.env`, in this order.

use std::{
    convert::Infallible,
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use clap::{Args, ValueEnum, builder::TypedValueParser};
use http::Uri;
use ipnet::IpNet;
use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgConnectOptions;
use tokio_rustls::rustls::ClientConfig;
use tracing_subscriber::filter::Targets;

use crate::{
    connection, database,
    keys::{Keyring, MIN_SECRET_BYTES, SigningKey},
    password,
    telemetry::LogFormat,
    tls::{self, Tls},
    types::error_chain::ErrorChain,
};

/// All settings. Each is a flag, and an environment variable of the same name.
#[derive(Clone, Debug, Args)]
pub struct Config {
    /// Address and port on which gRPC is served
    #[arg(long, env, global = true, default_value = "127.0.0.1:50051", value_parser = parse_address)]
    pub listen_addr: SocketAddr,

    /// Address and port on which metrics and probes are served, in plain HTTP/1.1; without it, they are not
    #[arg(long, env, global = true, value_parser = parse_address)]
    pub metrics_addr: Option<SocketAddr>,

    /// OpenTelemetry collector that gets traces over gRPC (OTLP), http://host:4317; without it, none are exported
    #[arg(long, env, global = true, value_parser = parse_collector)]
    pub otel_exporter_otlp_endpoint: Option<Uri>,

    /// Certificate that the server shows, and those between it and its authority, in PEM; without it, there is no TLS
    #[arg(long, env, global = true)]
    pub tls_cert_file: Option<PathBuf>,

    /// Private key of the certificate, in PEM
    #[arg(long, env, global = true)]
    pub tls_key_file: Option<PathBuf>,

    /// Authorities of the clients' certificates, in PEM; with it, a client without a certificate is refused
    #[arg(long, env, global = true)]
    pub tls_client_ca_file: Option<PathBuf>,

    /// PostgreSQL to use, postgresql://user:password@host/database; without it, a private one is started
    #[arg(long, env, global = true, hide_env_values = true, value_parser = secret())]
    pub database_url: Option<SecretString>,

    /// File that holds DATABASE_URL
    #[arg(long, env, global = true)]
    pub database_url_file: Option<PathBuf>,

    /// Signs the tokens: at least 32 random bytes; kept with the data of the private PostgreSQL, otherwise required
    #[arg(long, env, global = true, hide_env_values = true, value_parser = secret())]
    pub secret_key: Option<SecretString>,

    /// File that holds SECRET_KEY
    #[arg(long, env, global = true)]
    pub secret_key_file: Option<PathBuf>,

    /// The SECRET_KEY before the current one: still verifies tokens
    #[arg(long, env, global = true, hide_env_values = true, value_parser = secret())]
    pub secret_key_previous: Option<SecretString>,

    /// File that holds SECRET_KEY_PREVIOUS
    #[arg(long, env, global = true)]
    pub secret_key_previous_file: Option<PathBuf>,

    /// Algorithm that signs the access tokens
    #[arg(long, env, global = true, default_value = "HS256")]
    pub algorithm: Algorithm,

    /// `iss` of the access tokens
    #[arg(long, env, global = true, default_value = "fast-zero", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub token_issuer: String,

    /// `aud` of the access tokens
    #[arg(long, env, global = true, default_value = "fast-zero", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub token_audience: String,

    /// Lifetime of an access token, in minutes
    #[arg(long, env, global = true, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=MAX_ACCESS_TOKEN_MINUTES))]
    pub access_token_expire_minutes: u32,

    /// Lifetime of a session after its last refresh, in days
    #[arg(long, env, global = true, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=MAX_REFRESH_TOKEN_DAYS))]
    pub refresh_token_expire_days: u32,

    /// Passwords hashed at once, 19 MiB each
    #[arg(long, env, global = true, default_value_t = default_hashing_threads(), value_parser = clap::value_parser!(u16).range(1..=MAX_HASHING_THREADS))]
    pub hashing_threads: u16,

    /// Connections to the database at the most
    #[arg(long, env, global = true, default_value_t = default_max_connections(), value_parser = clap::value_parser!(u16).range(1..=MAX_DATABASE_CONNECTIONS))]
    pub database_max_connections: u16,

    /// Whether calls that ask the same kind of thing at once share a statement; false where a distributed database wants one owner in each
    #[arg(long, env, global = true, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub coalescing: bool,

    /// Whether to bring the database's schema up to date at the start
    #[arg(long, env, global = true, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub migrate_on_start: bool,

    /// How long to wait for the database at the start, in seconds
    #[arg(long, env, global = true, default_value_t = 60, value_parser = clap::value_parser!(u32).range(0..=MAX_WAIT_SECONDS))]
    pub database_wait_seconds: u32,

    /// How long to go on serving at the stop, while health already says NOT_SERVING, in seconds: until balancers have seen it
    #[arg(long, env, global = true, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=MAX_WAIT_SECONDS))]
    pub shutdown_delay_seconds: u32,

    /// How long calls under way may take to finish at the stop, in seconds
    #[arg(long, env, global = true, default_value_t = 8, value_parser = clap::value_parser!(u32).range(0..=MAX_WAIT_SECONDS))]
    pub shutdown_grace_seconds: u32,

    /// Calls under way at once; as many wait for half a second, more are turned away
    #[arg(long, env, global = true, default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_concurrent_calls: u16,

    /// Connections open at once
    #[arg(long, env, global = true, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    pub max_connections: u32,

    /// Connections open at once from one address, or one IPv6 network (/64)
    #[arg(long, env, global = true, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTIONS))]
    pub max_connections_per_peer: u32,

    /// How long a connection may be without a call, in seconds
    #[arg(long, env, global = true, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTION_SECONDS))]
    pub connection_idle_seconds: u32,

    /// How long a connection may live, give or take a tenth, in seconds: callers connect anew, to new replicas too
    #[arg(long, env, global = true, default_value_t = 1_800, value_parser = clap::value_parser!(u32).range(1..=MAX_CONNECTION_SECONDS))]
    pub connection_max_age_seconds: u32,

    /// Sign-ups, and refused changes of a name, in a minute from one address, or one IPv6 network (/64)
    #[arg(long, env, global = true, default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub sign_ups_per_peer_per_minute: u32,

    /// Networks of proxies, like 10.0.0.0/8,fd00::/8, that say in x-forwarded-for whom they speak for
    #[arg(long, env, global = true, value_delimiter = ',', value_parser = parse_network)]
    pub trusted_proxies: Vec<IpNet>,

    /// Whether to serve gRPC server reflection
    #[arg(long, env, global = true, default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub reflection: bool,

    /// Folder of the private PostgreSQL's data; by default the user's data folder
    #[arg(long, env, global = true)]
    pub fastzero_data_dir: Option<PathBuf>,

    /// What is logged: error, warn, info, debug or trace, for all or by module: warn,fast_zero=debug
    #[arg(long, env, global = true, default_value = "info")]
    pub rust_log: Targets,

    /// How the log is written; by default pretty on a terminal, else json
    #[arg(long, env, global = true)]
    pub log_format: Option<LogFormat>,

    /// The cost of password hashes. Not to be set from outside, where it could be set
    /// too low.
    #[arg(skip = password::default_cost())]
    pub hashing_cost: argon2::Params,
}

/// A year: whoever wants access tokens for longer wants something else.
const MAX_ACCESS_TOKEN_MINUTES: i64 = 365 * 24 * 60;
/// Ten years.
const MAX_REFRESH_TOKEN_DAYS: i64 = 3_650;
/// Well above the cores of a machine.
const MAX_HASHING_THREADS: i64 = 1_024;
/// Well above what one PostgreSQL serves well.
const MAX_DATABASE_CONNECTIONS: i64 = 1_000;
/// More than there are ports of one address.
const MAX_CONNECTIONS: i64 = 100_000;
/// A day.
const MAX_CONNECTION_SECONDS: i64 = 86_400;
/// An hour: longer than anybody waits.
const MAX_WAIT_SECONDS: i64 = 3_600;

/// How tokens are signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Algorithm {
    /// HMAC with SHA-256.
    #[value(name = "HS256")]
    Hs256,
}

/// A setting that cannot be used. It names the variable, never a secret's value.
#[derive(Debug)]
pub struct ConfigError {
    variable: &'static str,
    problem: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.variable, self.problem)
    }
}

impl std::error::Error for ConfigError {}

impl From<tls::Error> for ConfigError {
    fn from(error: tls::Error) -> Self {
        Self { variable: error.setting, problem: error.problem }
    }
}

impl Config {
    /// The database to use; `None` for a private one.
    pub fn database(&self) -> Result<Option<PgConnectOptions>, ConfigError> {
        let url = secret_of(
            "DATABASE_URL",
            self.database_url.as_ref(),
            self.database_url_file.as_deref(),
        )?;
        url.map(|url| parse_database_url(&url)).transpose()
    }

    /// The keys that are given; `None` if there are none.
    pub fn keyring(&self) -> Result<Option<Keyring>, ConfigError> {
        let file = self.secret_key_file.as_deref();
        let current = secret_of("SECRET_KEY", self.secret_key.as_ref(), file)?;
        current.map(|current| self.keyring_with(current)).transpose()
    }

    /// The keys, with one that is not given but kept.
    pub fn keyring_with(&self, current: SecretString) -> Result<Keyring, ConfigError> {
        let variable = "SECRET_KEY_PREVIOUS";
        let file = self.secret_key_previous_file.as_deref();
        let previous = secret_of(variable, self.secret_key_previous.as_ref(), file)?;
        let previous = previous.map(|previous| signing_key(variable, previous)).transpose()?;
        Ok(Keyring::new(signing_key("SECRET_KEY", current)?, previous))
    }

    /// TLS as the server speaks it; `None` in the clear.
    pub fn tls(&self) -> Result<Option<Tls>, ConfigError> {
        Ok(self.tls_files()?.map(Tls::load).transpose()?)
    }

    /// TLS as a client of this very server speaks it, which shows a certificate of its own
    /// (its file and that of its key) or else the server's.
    pub fn tls_client(
        &self,
        own: Option<(PathBuf, PathBuf)>,
    ) -> Result<Option<ClientConfig>, ConfigError> {
        let own = own.map(|(certificate, key)| tls::Pair {
            certificate: tls::File { setting: "--cert", path: certificate },
            key: tls::File { setting: "--key", path: key },
        });
        let files = self.tls_files()?;
        if files.is_none() && own.is_some() {
            return Err(missing("TLS_CERT_FILE", "--cert"));
        }
        Ok(files.map(|files| files.client(own.as_ref())).transpose()?)
    }

    fn tls_files(&self) -> Result<Option<tls::Files>, ConfigError> {
        let file = |setting, path: &Option<PathBuf>| {
            let path = path.clone().filter(|path| !path.as_os_str().is_empty())?;
            Some(tls::File { setting, path })
        };
        let certificate = file("TLS_CERT_FILE", &self.tls_cert_file);
        let key = file("TLS_KEY_FILE", &self.tls_key_file);
        let client_ca = file("TLS_CLIENT_CA_FILE", &self.tls_client_ca_file);
        match (certificate, key, client_ca) {
            (Some(certificate), Some(key), client_ca) => {
                Ok(Some(tls::Files { server: tls::Pair { certificate, key }, client_ca }))
            }
            (None, None, None) => Ok(None),
            (Some(_), None, _) => Err(missing("TLS_KEY_FILE", "TLS_CERT_FILE")),
            (None, Some(_), _) => Err(missing("TLS_CERT_FILE", "TLS_KEY_FILE")),
            (None, None, Some(_)) => Err(missing("TLS_CERT_FILE", "TLS_CLIENT_CA_FILE")),
        }
    }

    /// Where metrics are served; `None` if they are not.
    pub fn metrics(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let taken = self.listen_addr;
        let is_taken = |address: &SocketAddr| {
            let same_ip = address.ip() == taken.ip()
                || address.ip().is_unspecified()
                || taken.ip().is_unspecified();
            same_ip && address.port() == taken.port() && taken.port() != 0
        };
        if self.metrics_addr.as_ref().is_some_and(is_taken) {
            let problem = format!("must have another port than LISTEN_ADDR, {taken}");
            return Err(ConfigError { variable: "METRICS_ADDR", problem });
        }
        Ok(self.metrics_addr)
    }

    /// Where a client on this machine finds the server.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        local_addr(self.listen_addr)
    }

    /// [`Self::database_wait_seconds`]
    #[must_use]
    pub fn database_wait(&self) -> Duration {
        Duration::from_secs(self.database_wait_seconds.into())
    }

    /// [`Self::shutdown_delay_seconds`]
    #[must_use]
    pub fn shutdown_delay(&self) -> Duration {
        Duration::from_secs(self.shutdown_delay_seconds.into())
    }

    /// What connections may be and do.
    #[must_use]
    pub fn connection_limits(&self) -> connection::Limits {
        connection::Limits {
            total: self.max_connections as usize,
            max_age: Duration::from_secs(self.connection_max_age_seconds.into()),
            idle: Duration::from_secs(self.connection_idle_seconds.into()),
        }
    }

    /// [`Self::shutdown_grace_seconds`]
    #[must_use]
    pub fn shutdown_grace(&self) -> Duration {
        Duration::from_secs(self.shutdown_grace_seconds.into())
    }
}

/// What must be set where there is no private PostgreSQL to keep it.
#[must_use]
pub fn required(variable: &'static str) -> ConfigError {
    let problem = match variable {
        "SECRET_KEY" => {
            "must be set: at least 32 random bytes; `openssl rand -base64 32` makes some"
        }
        _ => "must be set: this binary is built without the private PostgreSQL",
    };
    ConfigError { variable, problem: problem.to_owned() }
}

/// A setting that makes no sense alone.
fn missing(variable: &'static str, where_set: &str) -> ConfigError {
    ConfigError { variable, problem: format!("must be set where {where_set} is") }
}

/// An address that one can connect to, for one that is listened on.
#[must_use]
pub fn local_addr(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

/// A secret, from its variable or from a file. Empty is as good as not set: that is what
/// compose makes of a variable that is not.
fn secret_of(
    variable: &'static str,
    value: Option<&SecretString>,
    file: Option<&Path>,
) -> Result<Option<SecretString>, ConfigError> {
    let value = value.filter(|value| !value.expose_secret().is_empty());
    let file = file.filter(|file| !file.as_os_str().is_empty());
    let Some(file) = file else {
        return Ok(value.cloned());
    };
    let failed = |problem| ConfigError { variable, problem };
    if value.is_some() {
        return Err(failed(format!("and {variable}_FILE are both set: only one of them may be")));
    }
    let text = fs::read_to_string(file).map_err(|error| {
        failed(format!("cannot be read from {variable}_FILE, {}: {error}", file.display()))
    })?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        return Err(failed(format!("is empty in {variable}_FILE, {}", file.display())));
    }
    Ok(Some(text.into()))
}

fn signing_key(variable: &'static str, secret: SecretString) -> Result<SigningKey, ConfigError> {
    SigningKey::new(secret).ok_or_else(|| ConfigError {
        variable,
        problem: format!(
            "is too short: it must have at least {MIN_SECRET_BYTES} bytes, and be random; \
             `openssl rand -base64 32` makes one"
        ),
    })
}

fn parse_database_url(url: &SecretString) -> Result<PgConnectOptions, ConfigError> {
    database::parse_url(url.expose_secret()).map_err(|cause| ConfigError {
        variable: "DATABASE_URL",
        problem: format!(
            "must be like postgresql://user:password@host:5432/database: {}",
            ErrorChain(&*cause)
        ),
    })
}

fn secret() -> impl TypedValueParser<Value = SecretString> {
    clap::builder::StringValueParser::new()
        .try_map(|text| Ok::<_, Infallible>(SecretString::from(text)))
}

fn parse_address(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse()
        .map_err(|_| "must be an IP address and a port, like 127.0.0.1:50051 or [::1]:50051")
}

fn parse_collector(text: &str) -> Result<Uri, &'static str> {
    let uri = text.parse().ok().filter(|uri: &Uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && matches!(uri.path(), "" | "/")
    });
    uri.ok_or("must be a URL of gRPC, like http://localhost:4317 or https://collector:4317")
}

/// A network, or one address.
fn parse_network(text: &str) -> Result<IpNet, &'static str> {
    let text = text.trim();
    let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map_err(|_| "must be a network, like 10.0.0.0/8 or fd00::/8, or an IP address")
}

fn cores() -> u16 {
    thread::available_parallelism()
        .map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX))
}

/// One core stays free for everything else.
fn default_hashing_threads() -> u16 {
    cores().saturating_sub(1).clamp(1, 64)
}

/// Statements take a fraction of a millisecond: a few connections keep all cores of a
/// database busy, more only make it switch between them.
fn default_max_connections() -> u16 {
    cores().saturating_mul(2).clamp(4, 32)
}
