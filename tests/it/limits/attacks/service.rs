//! The server under attack, and a well-behaved client that measures it.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::proto::todo::v1::Todo;
use tokio::time::{MissedTickBehavior, interval};

use super::{CALL_INTERVAL, largest_batchable_page};
use crate::support::{
    Client,
    app::connect,
    certificates::{CertificateAuthority, TlsSecret},
    metrics::Scrape,
    postgres::TestDatabase,
    process::{Binary, Process},
    todos::todo_titled,
    wait::wait_until,
};

/// The real binary, and a well-behaved client.
pub(super) struct Service {
    pub(super) server: Process,
    pub(super) address: SocketAddr,
    pub(super) metrics: SocketAddr,
    pub(super) client: Client,
    pub(super) todo: Todo,
    pub(super) _database: TestDatabase,
    pub(super) _secret: Option<TlsSecret>,
}

impl Service {
    pub(super) async fn start(has_tls: bool) -> Self {
        let database = TestDatabase::create().await;
        let authority = CertificateAuthority::new();
        let secret = has_tls.then(|| TlsSecret::new(&authority.issue(), None));
        let run = Binary::server(&database.url())
            .env("METRICS_ADDR", "127.0.0.1:0")
            .env("RUST_LOG", "warn,fast_zero::server=info");
        let run = secret
            .iter()
            .flat_map(TlsSecret::env_vars)
            .fold(run, |run, (name, path)| run.env(name, &path));
        let server = run.start();
        let address = server.address().await.parse().expect("an address");
        let metrics = server.metrics_address().await.parse().expect("an address");
        let channel = if has_tls {
            authority.client().connect(address).await.expect("connected")
        } else {
            connect(address).await
        };
        let (client, todo) = user_of_other_replica(&database).await;
        let client = client.with_channel(&channel);
        let service =
            Self { server, address, metrics, client, todo, _database: database, _secret: secret };
        service.client.list_todos(largest_batchable_page()).await;
        // Warm-up: the first calls open connections and fill caches.
        service.p99(Duration::from_millis(500)).await;
        service
    }

    /// Returns the p99 latency of the client's calls.
    pub(super) async fn p99(&self, round: Duration) -> Duration {
        let started = Instant::now();
        let mut times = Vec::new();
        let mut ticks = interval(CALL_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while started.elapsed() < round {
            ticks.tick().await;
            let called = Instant::now();
            self.client.get_todo(&self.todo.id).await;
            times.push(called.elapsed());
        }
        times.sort_unstable();
        times[(times.len() * 99).div_ceil(100) - 1]
    }

    /// Resets the peak of the server's memory.
    pub(super) fn reset_peak_memory(&self) {
        let path = format!("/proc/{}/clear_refs", self.server.pid());
        fs::write(path, "5").expect("the parent process may write it");
    }

    /// Asserts that the service works, has no calls or connections of the attack, and logged no
    /// error.
    pub(super) async fn assert_recovered(&self) {
        wait_until("only the client is connected", async || {
            let scrape = Scrape::fetch(self.metrics).await;
            let gauge = |name| scrape.get(name);
            gauge("fastzero_calls_in_flight") == Some(0.0)
                && gauge("fastzero_connections") == Some(1.0)
        })
        .await;
        self.client.list_todos(largest_batchable_page()).await;
        let output = self.server.output();
        assert!(
            !output.contains("panicked") && !output.contains("\"level\":\"ERROR\""),
            "{output}"
        );
    }
}

/// Creates a user with a list of 1 MiB through another replica, because the memory of a hash is
/// released late and would hide the growth by an attack. Returns the client and a todo.
pub(super) async fn user_of_other_replica(database: &TestDatabase) -> (Client, Todo) {
    let replica = Binary::server(&database.url()).start();
    let address = replica.address().await.parse().expect("an address");
    let client = Client::new(connect(address).await).signed_up("ana").await;
    let todo = client.create_todo("a").await;
    let description = "x".repeat(10_000);
    for _ in 0..100 {
        client
            .create_todo_with(Todo { description: description.clone(), ..todo_titled("a") })
            .await;
    }
    (client, todo)
}
