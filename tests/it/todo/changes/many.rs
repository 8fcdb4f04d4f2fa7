//! Many watches: what they cost when nothing happens, and when all of them read at once.

use std::time::{Duration, Instant};

use fast_zero::proto::todo::v1::WatchTodosRequest;

use crate::support::{
    App, Client,
    app::{adjusted, config_with, connect},
    changes::{Copy, next_message},
    metrics::config_with_metrics,
    parallel::join_all,
    postgres::TestDatabase,
    process::Binary,
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

#[tokio::test]
async fn a_thousand_idle_watches_take_at_most_40_mib() {
    const MAX_KIB: u64 = 40 * 1024;
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url())
        .env("MAX_WATCHES_PER_PEER", "2000")
        .env("MAX_WATCHES_PER_USER", "1000")
        .start();
    let address = server.address().await.parse().expect("an address");
    let ana = Client::new(connect(address).await).signed_up("ana").await;
    let mut streams = vec![ana.watch_from_now().await];
    let before = server.memory_kib("VmRSS");
    for _ in 0..10 {
        let ana = ana.clone().with_channel(&connect(address).await);
        for _ in 0..100 {
            if streams.len() < 1_000 {
                streams.push(ana.watch_from_now().await);
            }
        }
    }
    let more = server.memory_kib("VmRSS").saturating_sub(before);
    println!("{more} KiB for a thousand watches");
    assert!(more <= MAX_KIB, "{more} KiB");
}
