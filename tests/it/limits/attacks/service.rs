//! The server under attack, and a well-behaved client that measures it.

use std::{
    fs,
    net::SocketAddr,
    sync::Arc,
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
    tokens::Jwt,
    wait::wait_until,
};

/// The real binary, and a well-behaved client.
pub(super) struct Service {
    pub(super) server: Process,
    pub(super) address: SocketAddr,
    pub(super) metrics: SocketAddr,
    pub(super) client: Client,
    pub(super) todo: Todo,
    /// Access tokens of users with the same list as the client.
    pub(super) watchers: Arc<[Arc<str>]>,
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
        let watchers = copy_user(&database).await;
        let service = Self {
            server,
            address,
            metrics,
            client,
            todo,
            watchers,
            _database: database,
            _secret: secret,
        };
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

    /// Asserts that the service works, has no calls, watches or connections of the attack, and logged no
    /// error.
    pub(super) async fn assert_recovered(&self) {
        wait_until("only the client is connected", async || {
            let scrape = Scrape::fetch(self.metrics).await;
            let gauge = |name| scrape.get(name);
            gauge("fastzero_calls_in_flight") == Some(0.0)
                && gauge("fastzero_connections") == Some(1.0)
                && gauge("fastzero_watches") == Some(0.0)
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

/// As many users as can have all watches of one client: four times `MAX_WATCHES_PER_USER` are
/// `MAX_WATCHES_PER_PEER`.
const WATCHERS: u32 = 4;

/// Creates users with the todos of the first one, and returns their access tokens.
async fn copy_user(database: &TestDatabase) -> Arc<[Arc<str>]> {
    const COPY: &str = "
        with ana as (select id as owner_id from users limit 1), copied as (
            insert into users
            select cast($1::text as uuid), $1, $1, $1, $1, 'x', 1, now(), 1 returning id
        ), session as (
            insert into sessions
            select id, id, 0, now(), now() + interval '1 day', '', '' from copied
        ), clock as (
            insert into todo_clocks
            select id, version from copied, todo_clocks join ana using (owner_id)
        )
        insert into todos
        select copied.id, todos.id, title, title_folded, description, description_folded, state,
            version
        from copied, todos join ana using (owner_id)";
    let mut connection = database.connect().await;
    let mut tokens = Vec::new();
    for number in 0..WATCHERS {
        let id = format!("01890000-0000-7000-8000-{number:012}");
        sqlx::query(COPY).bind(&id).execute(&mut connection).await.expect("copied");
        tokens.push(Jwt::for_session(&id, &id).signed().into());
    }
    tokens.into()
}
