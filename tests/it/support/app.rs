//! The real server, in this process, on a database of its own.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
};

use argon2::Params;
use clap::Parser;
use fast_zero::{
    config::Config,
    keys::{Keyring, SigningKey},
    proto::user::v1::User,
    server::{Backing, Server},
};
use sqlx::{PgConnection, postgres::PgConnectOptions};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use super::{
    client::{Client, PASSWORD},
    postgres::TestDatabase,
    statements,
};

/// Signs the tokens of the servers under test.
pub const SECRET_KEY: &str = "a secret that only the tests know";

/// A server under test. It stops when this is dropped.
#[derive(Debug)]
pub struct App {
    pub address: SocketAddr,
    /// Where its metrics are, if the settings ask for them.
    pub metrics_address: Option<SocketAddr>,
    pub database: TestDatabase,
    pub channel: Channel,
    shutdown: CancellationToken,
    pub running: JoinHandle<()>,
}

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    config: Config,
}

/// Settings for tests: as by default, but with cheap password hashes.
pub fn config() -> Config {
    let arguments = Arguments::try_parse_from(["test"]).expect("the defaults are good");
    Config {
        hashing_cost: Params::new(Params::MIN_M_COST, 1, 1, Some(32)).expect("good parameters"),
        hashing_threads: 4,
        database_max_connections: 4,
        migrate_on_start: true,
        reflection: true,
        ..arguments.config
    }
}

pub fn signing_key(secret: &str) -> SigningKey {
    SigningKey::new(secret.into()).expect("long enough")
}

pub fn keyring() -> Keyring {
    Keyring::new(signing_key(SECRET_KEY), None)
}

impl App {
    /// Starts a server on a database of its own.
    pub async fn start() -> Self {
        Self::start_with(config()).await
    }

    /// Starts a server with other settings.
    pub async fn start_with(config: Config) -> Self {
        Self::start_on(TestDatabase::create().await, config, keyring()).await
    }

    /// Starts a server on a given database.
    pub async fn start_on(database: TestDatabase, config: Config, keyring: Keyring) -> Self {
        let options = database.options.clone();
        Self::start_through(database, options, config, keyring).await
    }

    /// Starts a server that reaches its database in another way than the test does.
    pub async fn start_through(
        database: TestDatabase,
        way: PgConnectOptions,
        config: Config,
        keyring: Keyring,
    ) -> Self {
        statements::count_from_now_on();
        let has_tls =
            config.tls_cert_file.as_ref().is_some_and(|file| !file.as_os_str().is_empty());
        let Serving { address, metrics_address, shutdown, running } =
            serve(way, config, keyring).await;
        // Where there is TLS, callers connect for themselves.
        let channel =
            if has_tls { endpoint(address).connect_lazy() } else { connect(address).await };
        Self { address, metrics_address, database, channel, shutdown, running }
    }

    /// Starts another server on the same database, as a replica would be. It stops when
    /// the test ends.
    pub async fn replica(&self) -> Replica {
        self.replica_with(config(), keyring()).await
    }

    /// Starts a replica with other settings or keys.
    pub async fn replica_with(&self, config: Config, keyring: Keyring) -> Replica {
        let Serving { address, shutdown, .. } =
            serve(self.database.options.clone(), config, keyring).await;
        Replica { channel: connect(address).await, shutdown }
    }

    /// A caller without a token.
    pub fn anonymous(&self) -> Client {
        Client::new(self.channel.clone())
    }

    /// As [`Client::signed_up`].
    pub async fn signed_up(&self, username: &str) -> Client {
        self.anonymous().signed_up(username).await
    }

    /// As [`Client::create_user`].
    pub async fn create_user(&self, username: &str) -> User {
        self.anonymous().create_user(username).await
    }

    /// Opens another session of a user that has the password [`PASSWORD`].
    pub async fn logged_in(&self, login: &str) -> Client {
        self.anonymous().logged_in(login, PASSWORD).await.expect("logged in")
    }

    /// A connection to the test's database.
    pub async fn sql(&self) -> PgConnection {
        self.database.connect().await
    }

    /// Asks the server to stop, as SIGTERM does.
    pub fn stop(&self) {
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
    shutdown: CancellationToken,
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

struct Serving {
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    shutdown: CancellationToken,
    running: JoinHandle<()>,
}

async fn serve(database: PgConnectOptions, config: Config, keyring: Keyring) -> Serving {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let (announce, announced) = oneshot::channel();
    let announce = |address| {
        let _ = announce.send(address);
    };
    let server = Server::start(listener, &config).await.expect("the server starts");
    let metrics_address = server.metrics_address();
    let running = tokio::spawn(async move {
        let backing = Backing { database, keyring };
        let ended = server.run(&config, backing, announce, stop).await;
        ended.expect("the server starts and stops");
    });
    let address = announced.await.expect("the server starts");
    Serving { address, metrics_address, shutdown, running }
}

/// A new connection to a server.
pub async fn connect(address: SocketAddr) -> Channel {
    endpoint(address).connect().await.expect("the server answers")
}

fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("a good address")
}

/// A name that no other user of this run has.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("{prefix}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}
