//! A real server, in the process of the test, on a database of its own.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use argon2::Params;
use clap::Parser;
use fast_zero::{Config, Server, proto::user::v1::User};
use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use super::{
    client::{Client, PASSWORD},
    postgres::TestDatabase,
    statements,
};

/// The key that signs the tokens of the servers under test.
pub const SECRET_KEY: &str = "a secret that only the tests know";

/// A server under test. It shuts down when the value is dropped.
#[derive(Debug)]
pub struct App {
    pub address: SocketAddr,
    /// The address of the port for metrics, if the settings enable it.
    pub metrics_address: Option<SocketAddr>,
    pub database: TestDatabase,
    pub channel: Channel,
    shutdown: CancellationToken,
    pub server_task: JoinHandle<()>,
}

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    config: Config,
}

/// Returns the settings for tests: the defaults, but with cheap password hashes.
pub fn config() -> Config {
    let arguments = Arguments::try_parse_from(["test"]).expect("valid defaults");
    adjusted(arguments.config, |config| {
        config.tokens.argon2_params =
            Params::new(Params::MIN_M_COST, 1, 1, Some(32)).expect("valid parameters");
        config.limits.hashing_threads = 4;
        config.limits.database_max_connections = 4;
        config.lifecycle.migrate_on_start = true;
        config.listen.reflection = true;
        config.tokens.secret_key = Some(SECRET_KEY.into());
    })
}

/// Returns the settings for tests with some changes.
pub fn config_with(change: impl FnOnce(&mut Config)) -> Config {
    adjusted(config(), change)
}

/// Returns settings with some changes.
pub fn adjusted(mut config: Config, change: impl FnOnce(&mut Config)) -> Config {
    change(&mut config);
    config
}

impl App {
    /// Starts a server on a database of its own.
    pub async fn start() -> Self {
        Self::start_with(config()).await
    }

    /// Starts a server with other settings.
    pub async fn start_with(config: Config) -> Self {
        Self::start_on(TestDatabase::create().await, config).await
    }

    /// Starts a server on a given database.
    pub async fn start_on(database: TestDatabase, config: Config) -> Self {
        let options = database.options.clone();
        Self::start_via(database, options, config).await
    }

    /// Starts a server that connects to its database with other options than the test does.
    pub async fn start_via(
        database: TestDatabase,
        options: PgConnectOptions,
        config: Config,
    ) -> Self {
        statements::install();
        let has_tls =
            config.tls.tls_cert_file.as_ref().is_some_and(|file| !file.as_os_str().is_empty());
        let RunningServer { address, metrics_address, shutdown, task } =
            spawn_server(options, config).await;
        // With TLS, tests connect by themselves.
        let channel =
            if has_tls { endpoint(address).connect_lazy() } else { connect(address).await };
        Self { address, metrics_address, database, channel, shutdown, server_task: task }
    }

    /// Starts a replica: another server on the same database. It shuts down when the value
    /// is dropped.
    pub async fn start_replica(&self) -> Replica {
        self.start_replica_with(config()).await
    }

    /// Starts a replica with other settings.
    pub async fn start_replica_with(&self, config: Config) -> Replica {
        let RunningServer { address, metrics_address, shutdown, .. } =
            spawn_server(self.database.options.clone(), config).await;
        Replica { channel: connect(address).await, metrics_address, shutdown }
    }

    /// Returns a client without a token.
    pub fn anonymous(&self) -> Client {
        Client::new(self.channel.clone())
    }

    /// Does the same as [`Client::signed_up`].
    pub async fn signed_up(&self, username: &str) -> Client {
        self.anonymous().signed_up(username).await
    }

    /// Does the same as [`Client::create_user`].
    pub async fn create_user(&self, username: &str) -> User {
        self.anonymous().create_user(username).await
    }

    /// Logs in a user with the password [`PASSWORD`].
    pub async fn logged_in(&self, login: &str) -> Client {
        self.anonymous().logged_in(login, PASSWORD).await.expect("logged in")
    }

    /// Connects to the database of the test.
    pub async fn connect_database(&self) -> PgConnection {
        self.database.connect().await
    }

    /// Starts a graceful shutdown, as SIGTERM does.
    pub fn shut_down(&self) {
        self.shutdown.cancel();
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Another server on the same database.
#[derive(Debug)]
pub struct Replica {
    pub channel: Channel,
    /// The address of the port for metrics, if the settings enable it.
    pub metrics_address: Option<SocketAddr>,
    shutdown: CancellationToken,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

struct RunningServer {
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

async fn spawn_server(database: PgConnectOptions, mut config: Config) -> RunningServer {
    config.database.database_url = Some(database.to_url_lossy().to_string().into());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let (ready_sender, ready) = oneshot::channel();
    let on_ready = |address| {
        let _ = ready_sender.send(address);
    };
    let server = Server::start(listener, &config).await.expect("the server starts");
    let metrics_address = server.admin_address();
    let task = tokio::spawn(async move {
        let result = server.run(&config, on_ready, stop).await;
        result.expect("the server starts and shuts down");
    });
    let address = ready.await.expect("the server starts");
    RunningServer { address, metrics_address, shutdown, task }
}

/// Connects to a server.
pub async fn connect(address: SocketAddr) -> Channel {
    endpoint(address).connect().await.expect("the server accepts connections")
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("a valid URL")
}

/// Returns a name that no other user of this run has.
pub fn unique_name(prefix: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("{prefix}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}
