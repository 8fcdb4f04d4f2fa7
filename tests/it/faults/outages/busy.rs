//! Connections that break, or just stall, while calls use them.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use fast_zero::{Config, proto::todo::v1::Todo};
use sqlx::AssertSqlSafe;
use tonic::{Code, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;

use super::{TOLERANCE, probe::call_with_short_deadline};
use crate::support::{
    App, Client,
    app::{config, config_with},
    assert::assert_status,
    health::check_health,
    parallel::join_all,
    postgres::TestDatabase,
    proxy::{self, Proxy},
    scheduling_delay::SchedulingDelay,
    todos::todo_titled,
    wait::wait_until,
};

/// More than there are connections, so that calls use all of them.
const CALLERS: usize = 16;

/// How long calls may fail: the interval of the health check, its ping, and what a new connection
/// takes.
const MAX_OUTAGE: Duration = Duration::from_secs(2);

/// How long a connection has to answer before it is closed: for a ping, and as long again while the
/// replacement opens, less two round trips.
const MAX_STALL: Duration = Duration::from_millis(1_000 + 1_000 - 400);

/// Starts a server behind a proxy with this latency.
async fn start(config: Config, latency: Duration) -> (App, Proxy) {
    let address = Proxy::reserve_address().await;
    let database = TestDatabase::create().await;
    let proxy = Proxy::open_with_latency(address, &database.options, latency).await;
    let options = proxy::options_via(address, &database.options);
    (App::start_via(database, options, config).await, proxy)
}

/// A caller that makes one call after the other.
#[derive(Clone)]
struct Caller {
    client: Client,
    todo: Todo,
    /// The address of the server, if calls have a short deadline until the connections die.
    address_for_short_deadline: Option<SocketAddr>,
    calls: Arc<AtomicUsize>,
    dead_since: Arc<OnceLock<Instant>>,
}

impl Caller {
    async fn call(&self) -> Result<(), Status> {
        match self.address_for_short_deadline {
            Some(address) if self.dead_since.get().is_none() => {
                let called = call_with_short_deadline(address, &self.client, &self.todo).await;
                called.response.map(drop)
            }
            _ => self.client.try_get_todo(&self.todo.id).await.map(drop),
        }
    }

    /// Makes calls until one succeeds that started after the connections died. Returns the errors.
    async fn run(self) -> Vec<Status> {
        let mut errors = Vec::new();
        loop {
            let started = Instant::now();
            let result = self.call().await;
            self.calls.fetch_add(1, Ordering::Relaxed);
            match result {
                Ok(()) if self.dead_since.get().is_some_and(|at| *at < started) => return errors,
                Ok(()) => {}
                Err(error) => errors.push(error),
            }
        }
    }
}

/// Drops all connections without a word while calls use them, asserts that all callers soon
/// succeed, and returns the errors until then.
async fn errors_of_dropped_connections(config: Config, has_short_deadline: bool) -> Vec<Status> {
    let expected = usize::from(config.limits.database_max_connections) + 1;
    let (app, proxy) = start(config, Duration::ZERO).await;
    // The proof that connections in use are dead is another one that does not answer.
    wait_until("the health check has a connection", async || {
        sessions(&app).await.len() == expected
    })
    .await;
    let client = app.signed_up("ana").await;
    let todo = client.create_todo("a").await;
    // However the callers are scheduled, a call uses a connection when all of them die.
    let mut lock = app.lock_todo(&todo.id).await;
    let update = tokio::spawn({
        let (client, todo) = (client.clone(), todo.clone());
        async move { client.try_update_todo(Some(todo), Some(&["title"])).await }
    });
    lock.wait_until_blocking().await;
    let caller = Caller {
        todo,
        client,
        address_for_short_deadline: has_short_deadline.then_some(app.address),
        calls: Arc::default(),
        dead_since: Arc::default(),
    };
    let scheduling_delay = SchedulingDelay::measure();
    let callers =
        tokio::spawn(join_all(vec![caller.clone(); CALLERS].into_iter().map(Caller::run)));
    wait_until("calls use all connections", async || {
        caller.calls.load(Ordering::Relaxed) > 2 * CALLERS
    })
    .await;
    proxy.pause_open_connections();
    let died_at = Instant::now();
    caller.dead_since.set(died_at).expect("set once");
    let mut errors = callers.await.expect("no panic");
    let updated = update.await.expect("no panic");
    errors.push(vec![updated.expect_err("its connection is dead")]);
    let (outage, tolerance) = (died_at.elapsed(), TOLERANCE + scheduling_delay.per_call());
    println!("{} errors in {outage:.1?}", errors.iter().map(Vec::len).sum::<usize>());
    assert!(outage < MAX_OUTAGE + tolerance, "{outage:?}, tolerance {tolerance:?}");
    errors.into_iter().flatten().collect()
}

#[tokio::test]
async fn connections_that_die_in_use_fail_calls_for_two_seconds_at_most() {
    for coalescing in [true, false] {
        let config = config_with(|config| config.limits.coalescing = coalescing);
        for error in errors_of_dropped_connections(config, false).await {
            assert_status(Err::<Response<()>, _>(error), Code::Unavailable, "DATABASE_UNAVAILABLE");
        }
    }
}

/// The statements of dropped calls do not hold their dead connections.
#[tokio::test]
async fn connections_that_die_under_dropped_calls_are_replaced_within_two_seconds() {
    let config = config_with(|config| config.limits.coalescing = false);
    errors_of_dropped_connections(config, true).await;
}

/// The connections of the pool, and that of the health check.
const SESSIONS: usize = 4 + 1;

/// Returns the process IDs of the server's sessions.
async fn sessions(app: &App) -> BTreeSet<i32> {
    let mut sql = app.connect_database().await;
    let sessions = sqlx::query_scalar(
        "select pid from pg_stat_activity
         where datname = current_database() and application_name = 'fast-zero'",
    );
    sessions.fetch_all(&mut sql).await.expect("rows").into_iter().collect()
}

/// As a database in another region that a burst of load stalls.
#[tokio::test]
async fn a_database_that_stalls_far_away_recovers_with_its_connections_and_statements() {
    let (app, proxy) = start(config(), Duration::from_millis(100)).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    wait_until("the connections are open", async || sessions(&app).await.len() == SESSIONS).await;
    let before = sessions(&app).await;
    let mut lock = app.lock_todo(&todo.id).await;
    let update = tokio::spawn({
        let ana = ana.clone();
        let changed = Todo { title: "b".into(), etag: String::new(), ..todo };
        async move { ana.try_update_todo(Some(changed), Some(&["title"])).await }
    });
    lock.wait_until_blocking().await;
    let stalled_at = Instant::now();
    proxy.pause();
    let accepted = proxy.accepted();
    wait_until("a replacement opens", async || proxy.accepted() > accepted).await;
    proxy.resume();
    let stall = stalled_at.elapsed();
    wait_until("no replacement is open", async || sessions(&app).await.len() <= SESSIONS).await;
    lock.release().await;
    let updated = update.await.expect("no panic");
    if let Err(status) = &updated {
        // On a slow machine. The statement is not given up.
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    }
    wait_until("the service is ready", async || {
        check_health(&app.channel, "").await == ServingStatus::Serving
    })
    .await;
    let after = sessions(&app).await;
    let has_all = after.is_superset(&before);
    assert!(stall > MAX_STALL || has_all, "{before:?}, {after:?} after {stall:?}: {updated:?}");
}

#[tokio::test]
async fn the_failed_statement_of_a_dropped_call_leaves_the_other_connections_open() {
    let (app, _proxy) = start(config(), Duration::ZERO).await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "create function fail() returns trigger language plpgsql as
         $$ begin perform pg_advisory_xact_lock(1); raise exception 'no'; end $$;
         create trigger fail before insert on todos for each row execute function fail()",
    )
    .await;
    wait_until("the connections are open", async || sessions(&app).await.len() == SESSIONS).await;
    let before = sessions(&app).await;
    let mut lock = app.hold_lock("select pg_advisory_xact_lock(1)").await;
    let call = tokio::spawn({
        let ana = ana.clone();
        async move { ana.try_create_todo(Some(todo_titled("a"))).await }
    });
    lock.wait_until_blocking().await;
    call.abort();
    // The server reads the end of the call before this one.
    ana.get_user("me").await;
    lock.release().await;
    let remaining = async || sessions(&app).await.intersection(&before).count();
    wait_until("the connection closes", async || remaining().await < SESSIONS).await;
    assert_eq!(remaining().await, SESSIONS - 1);
}

#[tokio::test]
async fn writes_to_a_read_only_database_leave_the_connections_open() {
    let (app, proxy) = start(config(), Duration::ZERO).await;
    let ana = app.signed_up("ana").await;
    let mut sql = app.connect_database().await;
    let refuse = "create function refuse() returns trigger language plpgsql as
        $$ begin raise exception 'read-only' using errcode = '25006'; end $$;
        create trigger refuse before insert on todos for each row execute function refuse()";
    sqlx::raw_sql(AssertSqlSafe(refuse)).execute(&mut sql).await.expect("created");
    let (opened_before, started) = (proxy.accepted(), Instant::now());
    for _ in 0..100 {
        let rejected = ana.try_create_todo(Some(todo_titled("a"))).await;
        assert_status(rejected, Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
    let opened = proxy.accepted() - opened_before;
    // One call at a time uses one connection, and the health check may use another.
    let closings = usize::try_from(started.elapsed().as_secs()).expect("seconds") + 1;
    assert!(opened <= 2 * closings, "{opened} connections, {closings} closings");
}
