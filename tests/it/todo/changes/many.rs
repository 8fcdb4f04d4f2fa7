//! Many watches: what they cost when nothing happens, and when all of them read at once.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::proto::todo::v1::{WatchTodosRequest, WatchTodosResponse};
use sqlx::PgConnection;
use tonic::Streaming;

use crate::support::{
    App, Client,
    app::{adjusted, config_with, connect},
    changes::{Copy, next_message},
    metrics::config_with_metrics,
    parallel::join_all,
    postgres::TestDatabase,
    process::Binary,
    statement_proxy::{StatementProxy, count},
    tokens::Jwt,
    wait::wait_until,
};

/// Nothing polls without a watch, and one statement serves all.
#[tokio::test]
async fn a_thousand_idle_watches_cost_one_poll_a_second() {
    const WATCHES: usize = 1_000;
    const SECONDS: u64 = 5;
    const POLLS: &str = "fastzero_watch_poll_duration_seconds_count";
    let app = App::start_with(adjusted(config_with_metrics(), |config| {
        config.limits.max_watches_per_peer = 2_000;
        config.limits.max_watches_per_user = 1_000;
    }))
    .await;
    let users = [app.signed_up("ana").await, app.signed_up("bob").await];
    assert_eq!(app.scrape().await.get(POLLS), Some(0.0));
    let mut streams = Vec::new();
    let mut channel = app.channel.clone();
    for number in 0..WATCHES {
        // A connection has at most 128 streams.
        if number % 100 == 0 {
            channel = connect(app.address).await;
        }
        let user = users[number % users.len()].clone().with_channel(&channel);
        streams.push(user.watch_from_now().await);
    }
    let (before, started) = (app.scrape().await, Instant::now());
    assert_eq!(before.get("fastzero_watches"), Some(1_000.0));
    tokio::time::sleep(Duration::from_secs(SECONDS)).await;
    let polls = app.scrape().await.get(POLLS).zip(before.get(POLLS));
    let polls = polls.map(|(after, before)| after - before).expect("a count");
    let seconds = started.elapsed().as_secs_f64();
    assert!(polls <= seconds * 1.12 + 1.0 && polls >= seconds * 0.5, "{polls} in {seconds} s");
    drop(streams);
    wait_until("all watches have ended", async || {
        app.scrape().await.get("fastzero_watches") == Some(0.0)
    })
    .await;
}

/// Watches that reconnect together, with a page each, all get it.
#[tokio::test]
async fn watches_read_two_pages_at_once() {
    let app = App::start_with(config_with(|config| {
        config.limits.max_watches_per_user = 64;
        // Two for the pages, and one for unary calls.
        config.limits.database_max_connections = 3;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    for number in 0..20 {
        ana.create_todo(&number.to_string()).await;
    }
    let lock = app.hold_lock("lock table todos in access exclusive mode").await;
    let opened = (0..60).map(|_| {
        let ana = ana.clone();
        async move { ana.watch_todos(WatchTodosRequest::default()).await }
    });
    let streams = join_all(opened.collect::<Vec<_>>()).await;
    // A call that does not read the locked table still gets a connection.
    ana.get_user("me").await;
    lock.release().await;
    for mut stream in streams {
        let mut copy = Copy::default();
        copy.apply(next_message(&mut stream).await);
        assert_eq!(copy.todos.len(), 20);
    }
}

/// Watches that reconnect together, while the statement of their pages waits.
#[tokio::test]
async fn a_herd_of_watches_leaves_connections_to_other_calls() {
    const WATCHES: usize = 200;
    const CALLS: usize = 200;
    let app = App::start_with(config_with(|config| {
        config.limits.max_watches_per_peer = 1_000;
        config.limits.max_watches_per_user = 100;
    }))
    .await;
    let users = [app.signed_up("ana").await, app.signed_up("bob").await];
    let todo = users[0].create_todo("ana's").await;
    users[1].create_todo("bob's").await;
    // Pages read the deleted todos, and GetTodo does not.
    let mut lock = app.hold_lock("lock table todo_trash in access exclusive mode").await;
    let mut channels = Vec::new();
    for _ in 0..4 {
        channels.push(connect(app.address).await);
    }
    let opened = (0..WATCHES).map(|number| {
        let user = users[number % users.len()].clone().with_channel(&channels[number % 4]);
        tokio::spawn(async move {
            let mut stream = user.watch_todos(WatchTodosRequest::default()).await;
            next_message(&mut stream).await
        })
    });
    let opened: Vec<_> = opened.collect();
    lock.wait_until_blocked_by(2).await;
    let ana = users[0].clone().with_metadata("grpc-timeout", "2S");
    let (started, mut latencies) = (Instant::now(), Vec::new());
    for _ in 0..CALLS {
        let called = Instant::now();
        assert_eq!(ana.get_todo(&todo.id).await, todo);
        latencies.push(called.elapsed());
    }
    latencies.sort_unstable();
    let (p50, p99) = (latencies[CALLS / 2], latencies[CALLS * 99 / 100]);
    println!(
        "{WATCHES} watches: {CALLS} calls in {:.1?}, p50 {p50:.1?}, p99 {p99:.1?}",
        started.elapsed()
    );
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    for opened in opened {
        let message = opened.await.expect("no panic");
        assert!(message.caught_up && message.changes.len() == 1, "{message:?}");
    }
}

/// Watches that end while their statements run do not take more connections than others.
#[tokio::test]
async fn watches_that_are_reset_leave_connections_to_other_calls() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut lock = app.hold_lock("lock table todo_trash in access exclusive mode").await;
    // As many as there are connections.
    for number in 1..=4 {
        let opened = ana.watch_todos(WatchTodosRequest::default()).await;
        lock.wait_until_blocked_by(number.min(2)).await;
        drop(opened);
    }
    let ana = ana.with_metadata("grpc-timeout", "2S");
    assert_eq!(ana.get_todo(&todo.id).await, todo);
    lock.release().await;
}

/// The owners of the idle watches: they exist only in the database, because a thousand sign-ups
/// take a minute.
const OWNERS: &str = "
    insert into users
    select id, n, n, n, n, 'x', 1, now(), 1
    from generate_series(1, 1000) as n,
        concat('01890000-0000-7000-8000-', lpad(n::text, 12, '0')) as text, cast(text as uuid) as id;
    insert into sessions
    select id, id, 0, now(), now() + interval '1 day', '', '' from users;
    insert into todo_clocks select id, 20 from users;
    insert into todos
    select id, gen_random_uuid(), n, n, repeat('a', 2000), '', 1, n
    from users, generate_series(1, 20) as n";

/// Opens a watch of each owner, on ten connections: one has at most 128 streams. Each reads 40 KB
/// before it is idle.
async fn watch_as_a_thousand_owners(address: SocketAddr) -> Vec<Streaming<WatchTodosResponse>> {
    let opened = (0..10).map(|connection| async move {
        let channel = connect(address).await;
        let mut streams = Vec::new();
        for number in 1..=100 {
            let id = format!("01890000-0000-7000-8000-{:012}", connection * 100 + number);
            let owner = Client::new(channel.clone());
            let owner = owner.with_token(&Jwt::for_session(&id, &id).signed());
            let mut stream = owner.watch_todos(WatchTodosRequest::default()).await;
            let mut copy = Copy::default();
            while copy.todos.len() < 20 {
                copy.apply(next_message(&mut stream).await);
            }
            streams.push(stream);
        }
        streams
    });
    join_all(opened.collect::<Vec<_>>()).await.into_iter().flatten().collect()
}

/// Returns how many polls `pg_stat_statements` has counted, where PostgreSQL has loaded it.
async fn counted_polls(database: &mut PgConnection) -> Option<i64> {
    let create = "create extension if not exists pg_stat_statements";
    sqlx::raw_sql(create).execute(&mut *database).await.ok()?;
    let polls = "select coalesce(sum(calls), 0)::bigint from pg_stat_statements
        where dbid = (select oid from pg_database where datname = current_database())
            and query like '%from database_incarnation as incarnation%left join todo_clocks%'";
    sqlx::query_scalar(polls).fetch_one(database).await.ok()
}

/// The statements of a replica in this many polls, with and without watches.
#[tokio::test]
async fn a_thousand_idle_watches_of_a_thousand_owners_cost_40_mib_and_two_statements() {
    const MAX_KIB: u64 = 40 * 1024;
    const POLLS: u64 = 15;
    const POLL: &str = "from database_incarnation as incarnation";
    const SESSIONS: &str = "as inputs (user_id";
    const HEALTH: &str = "clock_timestamp()";
    let database = TestDatabase::create().await;
    let mut connection = database.connect().await;
    sqlx::raw_sql(OWNERS).execute(&mut connection).await.expect("inserted");
    let proxy = StatementProxy::start(&database.options).await;
    let server = Binary::server(&proxy.url()).env("MAX_WATCHES_PER_PEER", "2000").start();
    let address = server.address().await.parse().expect("an address");
    // The first call opens connections.
    Client::new(connect(address).await).try_get_user("me").await.expect_err("no token");
    let before = server.memory_kib("VmRSS");
    let streams = watch_as_a_thousand_owners(address).await;
    let more = server.memory_kib("VmRSS").saturating_sub(before);

    let polled_from = counted_polls(&mut connection).await;
    let (from, started) = (proxy.counts(), Instant::now());
    let polls = count(&from, POLL) + POLLS;
    wait_until("the clocks are polled", async || proxy.count(POLL) >= polls).await;
    let to = proxy.counts();
    let counted = |text| count(&to, text) - count(&from, text);
    let (polls, sessions, health) = (counted(POLL), counted(SESSIONS), counted(HEALTH));
    let all = counted("");
    let (polled_to, took) = (counted_polls(&mut connection).await, started.elapsed());
    let more_idle = server.memory_kib("VmRSS").saturating_sub(before);
    println!(
        "{more} KiB for {} watches, {more_idle} KiB after {took:.1?}; {polls} polls, {sessions} \
         checks of sessions, {health} health checks, {all} statements; pg_stat_statements: {:?} polls",
        streams.len(),
        polled_from.zip(polled_to).map(|(from, to)| to - from),
    );
    assert!(more.max(more_idle) <= MAX_KIB, "{more} KiB, {more_idle} KiB");
    // Between two of them passes the whole interval.
    let shortest = |count: u64, interval: Duration| {
        interval * u32::try_from(count.saturating_sub(1)).expect("few") <= took
    };
    assert!(shortest(polls, Duration::from_millis(900)), "{polls} polls in {took:?}");
    assert!(shortest(sessions, Duration::from_secs(2)), "{sessions} checks in {took:?}");
    assert_eq!(all, polls + sessions + health, "{to:#?}");
    if let Some((from, to)) = polled_from.zip(polled_to) {
        let polls = i64::try_from(polls).expect("few");
        assert!((to - from).abs_diff(polls) <= 1, "{from} to {to}, but {polls}");
    }
}
