//! The server under attack, and a well-behaved client that measures it.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::proto::todo::v1::Todo;
use tokio::time::{MissedTickBehavior, interval};

use super::{CALL_EVERY, all};
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

/// The real binary, and a caller of it who behaves.
pub(super) struct Service {
    pub(super) server: Process,
    pub(super) address: SocketAddr,
    pub(super) metrics: SocketAddr,
    pub(super) caller: Client,
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
        let (caller, todo) = signed_up_elsewhere(&database).await;
        let caller = caller.with_channel(&channel);
        let service =
            Self { server, address, metrics, caller, todo, _database: database, _secret: secret };
        service.caller.list_todos(all()).await;
        // All that is done once is done.
        service.p99(Duration::from_millis(500)).await;
        service
    }

    /// How long all but the slowest hundredth of the caller's calls take.
    pub(super) async fn p99(&self, round: Duration) -> Duration {
        let begun = Instant::now();
        let mut times = Vec::new();
        let mut ticks = interval(CALL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while begun.elapsed() < round {
            ticks.tick().await;
            let called = Instant::now();
            self.caller.get_todo(&self.todo.id).await;
            times.push(called.elapsed());
        }
        times.sort_unstable();
        times[(times.len() * 99).div_ceil(100) - 1]
    }

    /// Begins to look for the peak anew.
    pub(super) fn forget_peak(&self) {
        let path = format!("/proc/{}/clear_refs", self.server.pid());
        fs::write(path, "5").expect("it is allowed to who started it");
    }

    /// Afterwards it works, nothing of the attack is left, and nothing went wrong.
    pub(super) async fn recovers(&self) {
        wait_until("only the caller is left", async || {
            let scrape = Scrape::fetch(self.metrics).await;
            let gauge = |name| scrape.get(name);
            gauge("fastzero_calls_in_flight") == Some(0.0)
                && gauge("fastzero_connections") == Some(1.0)
        })
        .await;
        self.caller.list_todos(all()).await;
        let output = self.server.output();
        assert!(
            !output.contains("panicked") && !output.contains("\"level\":\"ERROR\""),
            "{output}"
        );
    }
}

/// A user whose list has a MiB, and one of their to-dos, by way of another replica: the memory of
/// a hash stays for a while, and would hide that of an attack.
pub(super) async fn signed_up_elsewhere(database: &TestDatabase) -> (Client, Todo) {
    let replica = Binary::server(&database.url()).start();
    let address = replica.address().await.parse().expect("an address");
    let caller = Client::new(connect(address).await).signed_up("ana").await;
    let todo = caller.create_todo("a").await;
    let description = "x".repeat(10_000);
    for _ in 0..100 {
        caller
            .create_todo_with(Todo { description: description.clone(), ..todo_titled("a") })
            .await;
    }
    (caller, todo)
}
