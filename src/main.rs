//! The command line. The only place that reads the settings and ends the process.

use std::{
    env,
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    process::ExitCode,
};

use clap::{
    Arg, CommandFactory, FromArgMatches, Parser, Subcommand, builder::Resettable, error::ErrorKind,
};
#[cfg(feature = "embedded")]
use fast_zero::embedded;
use fast_zero::{
    config::{self, Config, ConfigError},
    database,
    error::Error,
    keys::Keyring,
    probe::{self, Outcome},
    server::{Backing, Server},
    shutdown::Shutdown,
    telemetry,
    types::error_chain::{BoxError, ErrorChain},
};
use secrecy::ExposeSecret;
use sqlx::postgres::PgConnectOptions;
use tokio::{net::TcpListener, sync::oneshot};

use embedded::Embedded;

/// Many small pieces are taken on one thread and given back on another, for which glibc's
/// locks each of them; and what a burst of calls took is given back to the system.
#[cfg(all(feature = "jemalloc", target_os = "linux"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Users, authentication and to-dos over gRPC, on PostgreSQL.
///
/// Every option can be given as an environment variable too, or in a file `.env` in the
/// working folder; an option comes before a variable, and a variable before the file.
#[derive(Debug, Parser)]
#[command(version = VERSION)]
struct Arguments {
    #[command(flatten)]
    config: Config,
    #[command(subcommand)]
    command: Option<Command>,
}

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("FASTZERO_COMMIT"), ")");

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve gRPC (the default)
    Serve,
    /// Bring the database's schema up to date, and end
    Migrate,
    /// Ask the server how it is: exits with 0 when it is SERVING, 2 when nobody answers, 3 when the rpc fails, 4 when it is not SERVING
    Healthcheck {
        /// host:port of the server; by default the one that LISTEN_ADDR describes
        #[arg(long)]
        addr: Option<String>,
        /// Service to ask about; by default the server as a whole
        #[arg(long, default_value = "")]
        service: String,
        /// Certificate to show to a server with TLS_CLIENT_CA_FILE, in PEM; by default the one in TLS_CERT_FILE
        #[arg(long, requires = "key")]
        cert: Option<PathBuf>,
        /// Private key of that certificate, in PEM
        #[arg(long, requires = "cert")]
        key: Option<PathBuf>,
    },
    /// Run the private PostgreSQL alone: print its URL, stay until a signal
    #[cfg(feature = "embedded")]
    Postgres {
        /// Stop at the end of the standard input, too
        #[arg(long)]
        lifeline: bool,
        /// Keep the data in a temporary folder, and remove it at the end
        #[arg(long)]
        temporary: bool,
    },
}

/// Why the process ends, and with which code (sysexits.h).
enum Failure {
    Usage(clap::Error),
    Config(BoxError),
    Runtime(BoxError),
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::Config(error.into())
    }
}

impl From<BoxError> for Failure {
    fn from(cause: BoxError) -> Self {
        Self::Runtime(cause)
    }
}

#[cfg(feature = "embedded")]
impl From<embedded::Error> for Failure {
    fn from(error: embedded::Error) -> Self {
        Self::Runtime(error.into())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Runtime(error.into())
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

impl Failure {
    fn report(self) -> ExitCode {
        match self {
            Self::Usage(error) => {
                // Nobody may be there to read it.
                let _ = error.print();
                ExitCode::from(match error.kind() {
                    ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
                    ErrorKind::InvalidValue | ErrorKind::ValueValidation => 78,
                    _ => 64,
                })
            }
            Self::Config(cause) => {
                tell(&*cause);
                ExitCode::from(78)
            }
            Self::Runtime(cause) => {
                tell(&*cause);
                ExitCode::FAILURE
            }
        }
    }
}

/// The last words of the process; nobody may be there to read them.
fn tell(cause: &(dyn std::error::Error + 'static)) {
    let _ = writeln!(io::stderr(), "error: {}", ErrorChain(cause));
}

fn run() -> Result<ExitCode, Failure> {
    load_dotenv()?;
    let arguments = parse_arguments().map_err(Failure::Usage)?;
    let config = arguments.config;
    let _log = telemetry::start(config.rust_log.clone(), config.log_format);
    match arguments.command.unwrap_or(Command::Serve) {
        Command::Serve => on_runtime(serve(&config)),
        Command::Migrate => on_runtime(migrate(&config)),
        Command::Healthcheck { addr, service, cert, key } => {
            let address = addr.unwrap_or_else(|| config.local_addr().to_string());
            let tls = config.tls_client(cert.zip(key))?;
            on_runtime(async { Ok(exit_code(probe::probe(&address, &service, tls).await)) })
        }
        // Has a runtime of its own, which begins after it has changed the user.
        #[cfg(feature = "embedded")]
        Command::Postgres { lifeline, temporary } => {
            let data_dir = config.fastzero_data_dir;
            embedded::run(&embedded::Options { data_dir, lifeline, temporary })?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// A variable that is empty is as good as not set: that is what compose makes of one that
/// is not.
fn parse_arguments() -> Result<Arguments, clap::Error> {
    let is_empty = |arg: &Arg| {
        let value = arg.get_env().and_then(env::var_os);
        value.is_some_and(|value| value.is_empty())
    };
    let command = Arguments::command()
        .mut_args(|arg| if is_empty(&arg) { arg.env(Resettable::Reset) } else { arg });
    Arguments::from_arg_matches(&command.try_get_matches()?)
}

/// Variables that are set already stay as they are.
fn load_dotenv() -> Result<(), Failure> {
    match dotenvy::from_path(".env") {
        Ok(()) => Ok(()),
        Err(error) if error.not_found() => Ok(()),
        // The error would show the line, in which a secret may stand.
        Err(dotenvy::Error::LineParse(_, column)) => Err(Failure::Config(
            format!(".env has a line that is no NAME=value (error at its character {column})")
                .into(),
        )),
        Err(error) => Err(Failure::Config(format!(".env cannot be read: {error}").into())),
    }
}

fn on_runtime(work: impl Future<Output = Result<ExitCode, Failure>>) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    // A hash that nobody waits for does not hold the exit.
    runtime.shutdown_background();
    result
}

/// As `grpc_health_probe` exits.
fn exit_code(outcome: Outcome) -> ExitCode {
    ExitCode::from(match outcome {
        Outcome::Serving => 0,
        Outcome::NoConnection => 2,
        Outcome::RpcFailed => 3,
        Outcome::NotServing => 4,
    })
}

/// Where the data is: a database that is configured, or a private PostgreSQL, which runs
/// as long as this lives.
struct Source {
    database: PgConnectOptions,
    private: Option<Embedded>,
}

impl Source {
    async fn open(config: &Config) -> Result<Self, Failure> {
        if let Some(database) = config.database()? {
            return Ok(Self { database, private: None });
        }
        let private = Embedded::start(config.fastzero_data_dir.as_deref()).await?;
        let database = database::parse_url(private.url().expose_secret())?;
        Ok(Self { database, private: Some(private) })
    }

    /// The keys that are configured, or, with a private PostgreSQL, those kept with it.
    fn keyring(&self, config: &Config) -> Result<Keyring, Failure> {
        match config.keyring()? {
            Some(keyring) => Ok(keyring),
            None if self.private.is_some() => {
                let kept = embedded::kept_secret_key(config.fastzero_data_dir.as_deref())?;
                Ok(config.keyring_with(kept)?)
            }
            None => Err(config::required("SECRET_KEY").into()),
        }
    }

    /// Tells a newcomer what to do next; those with a database of their own know.
    fn greet(&self, config: &Config, address: SocketAddr) {
        if self.private.is_some() {
            let file = config.tls_cert_file.as_ref().filter(|file| !file.as_os_str().is_empty());
            let trust =
                file.map_or("-plaintext".to_owned(), |file| format!("-cacert {}", file.display()));
            // Nobody may be there to read it.
            let _ = writeln!(
                io::stdout(),
                "fast-zero serves gRPC at {address} on a private PostgreSQL. Try:\n\n    \
                 grpcurl {trust} -d '{{\"username\": \"ana\", \"email\": \"ana@example.com\", \
                 \"password\": \"correct horse\"}}' {address} fastzero.user.v1.UserService/CreateUser\n"
            );
        }
    }

    /// Waits until the private PostgreSQL ends by itself; for ever if there is none.
    async fn lost(&mut self) -> Failure {
        match &mut self.private {
            Some(private) => private.ended().await.into(),
            None => std::future::pending().await,
        }
    }

    async fn close(self) {
        if let Some(private) = self.private {
            private.stop().await;
        }
    }
}

async fn serve(config: &Config) -> Result<ExitCode, Failure> {
    // Before anything is started for nothing.
    let has_database = config.database()?.is_some();
    if config.keyring()?.is_none() && has_database {
        return Err(config::required("SECRET_KEY").into());
    }
    config.tls()?;
    config.metrics()?;
    let shutdown = Shutdown::on_signals()?;
    let listener = TcpListener::bind(config.listen_addr).await.map_err(|error| {
        Failure::Runtime(format!("cannot listen on {}: {error}", config.listen_addr).into())
    })?;
    let server = Server::start(listener, config).await?;
    let mut source = tokio::select! {
        source = Source::open(config) => source?,
        () = shutdown.requested.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    let result = serve_from(&mut source, server, config, &shutdown).await;
    source.close().await;
    result
}

async fn serve_from(
    source: &mut Source,
    server: Server,
    config: &Config,
    shutdown: &Shutdown,
) -> Result<ExitCode, Failure> {
    let keyring = source.keyring(config)?;
    let backing = Backing { database: source.database.clone(), keyring };
    let (announce, announced) = oneshot::channel();
    let announce = |address| {
        // Nobody listens when the process is about to end.
        let _ = announce.send(address);
    };
    let running = pin!(server.run(config, backing, announce, shutdown.requested.clone()));
    let mut running = pin!(async {
        tokio::select! {
            ended = running => Ok(ended.map(|()| ExitCode::SUCCESS)?),
            () = shutdown.forced.cancelled() => Ok(ExitCode::FAILURE),
        }
    });
    tokio::select! {
        ended = &mut running => return ended,
        failure = source.lost() => return Err(failure),
        Ok(address) = announced => source.greet(config, config::local_addr(address)),
    }
    tokio::select! {
        ended = running => ended,
        failure = source.lost() => Err(failure),
    }
}

async fn migrate(config: &Config) -> Result<ExitCode, Failure> {
    let source = Source::open(config).await?;
    let patience = config.database_wait();
    let migrated = async {
        database::reach(&source.database, patience).await?;
        database::migrate(&source.database, patience).await
    };
    let result = migrated.await.map_err(Error::into_cause);
    source.close().await;
    result?;
    tracing::info!("the schema is up to date");
    Ok(ExitCode::SUCCESS)
}

/// What stands for the private PostgreSQL in a binary that is built without it.
#[cfg(not(feature = "embedded"))]
#[expect(clippy::unused_async, reason = "its functions are those of the real one")]
mod embedded {
    use std::path::Path;

    use fast_zero::config::{ConfigError, required};
    use secrecy::SecretString;

    pub(crate) enum Embedded {}

    impl Embedded {
        pub(crate) async fn start(_: Option<&Path>) -> Result<Self, ConfigError> {
            Err(required("DATABASE_URL"))
        }

        pub(crate) fn url(&self) -> &SecretString {
            match *self {}
        }

        pub(crate) async fn ended(&mut self) -> ConfigError {
            match *self {}
        }

        pub(crate) async fn stop(self) {
            match self {}
        }
    }

    pub(crate) fn kept_secret_key(_: Option<&Path>) -> Result<SecretString, ConfigError> {
        Err(required("SECRET_KEY"))
    }
}
