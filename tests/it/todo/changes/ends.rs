//! How watches end: each with a last cursor, from which the next one resumes.

use std::time::{Duration, Instant};

use fast_zero::proto::{
    auth::v1::LogoutScope,
    todo::v1::{WatchTodosRequest, WatchTodosResponse},
};
use tokio::time::timeout;
use tonic::{Code, Status, Streaming, transport::Endpoint};
use tonic_types::StatusExt;

use crate::support::{
    App, Client,
    app::{adjusted, config, config_with, connect},
    assert::{assert_has_error_details, assert_status},
    changes::{described, next_message},
    parallel::join_all,
    postgres::TestDatabase,
    process::Binary,
    proxy::{self, Proxy},
    statements::statement_count,
    wait::{wait_until, with_timeout},
};

/// Longer than any watch of these tests lasts.
const END_TIMEOUT: Duration = Duration::from_mins(1);

/// Reads a watch to its end, and returns the messages and the status.
async fn rest_of(mut stream: Streaming<WatchTodosResponse>) -> (Vec<WatchTodosResponse>, Status) {
    let mut messages = Vec::new();
    loop {
        let message = timeout(END_TIMEOUT, stream.message()).await;
        match message.expect("the end of a watch in time") {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => panic!("a watch ends with an error"),
            Err(status) => return (messages, status),
        }
    }
}

/// Reads a watch to its end, and returns the last message and the status.
async fn end_of(stream: Streaming<WatchTodosResponse>) -> (WatchTodosResponse, Status) {
    let (messages, status) = rest_of(stream).await;
    (messages.last().expect("a last message").clone(), status)
}

/// Asserts that a watch has ended with this reason and a cursor from which the next one resumes.
#[track_caller]
fn assert_ended(
    (last, status): &(WatchTodosResponse, Status),
    code: Code,
    reason: &str,
) -> WatchTodosRequest {
    assert_eq!(status.code(), code, "{status:?}");
    assert_has_error_details(status);
    let info = status.get_error_details().error_info().expect("asserted").clone();
    assert_eq!(info.reason, reason);
    assert_eq!((last.changes.len(), last.caught_up, last.full), (0, false, false));
    WatchTodosRequest { cursor: last.cursor.clone(), from_now: false }
}

/// Opens a watch from the start, and takes its first message.
async fn watch(client: &Client) -> Streaming<WatchTodosResponse> {
    let mut stream = client.watch_todos(WatchTodosRequest::default()).await;
    assert!(next_message(&mut stream).await.caught_up);
    stream
}

#[tokio::test]
async fn a_watch_ends_at_its_deadline() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let stream = watch(&ana.clone().with_metadata("grpc-timeout", "300m")).await;
    let ended = end_of(stream).await;
    let resumed = assert_ended(&ended, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    ana.create_todo("b").await;
    let mut stream = ana.watch_todos(resumed).await;
    assert_eq!(described(&next_message(&mut stream).await.changes), ["b"]);
}

#[tokio::test]
async fn a_watch_ends_within_five_seconds_after_its_session_on_any_replica() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let here = watch(&ana).await;
    let there = watch(&ana.clone().with_channel(&replica.channel)).await;
    let started = Instant::now();
    ana.log_out(LogoutScope::ThisSession).await;
    for stream in [here, there] {
        assert_ended(&end_of(stream).await, Code::Unauthenticated, "SESSION_REVOKED");
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_watch_ends_within_five_seconds_after_its_user_on_any_replica() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let here = watch(&ana).await;
    let there = watch(&ana.clone().with_channel(&replica.channel)).await;
    let started = Instant::now();
    ana.try_delete_user("me", "").await.expect("deleted");
    for stream in [here, there] {
        assert_ended(&end_of(stream).await, Code::Unauthenticated, "SESSION_REVOKED");
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_shutdown_ends_watches_with_a_last_cursor() {
    const WATCHES: usize = 200;
    let mut app = App::start_with(adjusted(config(), |config| {
        config.limits.max_watches_per_peer = 1_000;
        config.limits.max_watches_per_user = 100;
    }))
    .await;
    let replica = app.start_replica().await;
    let users = [app.signed_up("ana").await, app.signed_up("bob").await];
    let mut streams = Vec::new();
    for number in 0..WATCHES {
        let user = &users[number % users.len()];
        let user = user.clone().with_channel(&connect(app.address).await);
        streams.push(watch(&user).await);
    }
    let started = Instant::now();
    app.shut_down();
    let ended = join_all(streams.into_iter().map(end_of).collect::<Vec<_>>()).await;
    let mut delays = Vec::new();
    for ended in &ended {
        assert_ended(ended, Code::Unavailable, "STOPPING");
        let delay = ended.1.get_error_details().retry_info().and_then(|info| info.retry_delay);
        delays.push(delay.expect("a delay"));
    }
    assert!(delays.iter().all(|delay| *delay <= Duration::from_secs(2)), "{delays:?}");
    delays.sort_unstable();
    let (early, late) = (delays[WATCHES / 4], delays[WATCHES * 3 / 4]);
    assert!(late > early + Duration::from_millis(200), "{early:?}, {late:?}");
    with_timeout("the end of the server", &mut app.server_task).await.expect("a clean stop");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    // The results are in the order of their ends: each cursor belongs to one of the users.
    let resumed = assert_ended(&ended[0], Code::Unavailable, "STOPPING");
    let mut resumptions = 0;
    for user in users {
        let there = user.with_channel(&replica.channel);
        there.create_todo("later").await;
        if let Ok(stream) = there.try_watch_todos(resumed.clone()).await {
            let mut stream = stream.into_inner();
            assert_eq!(described(&next_message(&mut stream).await.changes), ["later"]);
            resumptions += 1;
        }
    }
    assert_eq!(resumptions, 1);
}

#[tokio::test]
async fn the_log_says_what_a_watch_has_sent_and_why_it_has_ended() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let address = server.address().await.parse().expect("an address");
    let ana = Client::new(connect(address).await).signed_up("ana").await;
    ana.create_todo("a").await;
    ana.create_todo("b").await;
    let ana = ana.with_metadata("x-request-id", "a-watch").with_metadata("grpc-timeout", "300m");
    end_of(watch(&ana).await).await;
    let line = server.wait_for_line("\"code\":\"DEADLINE_EXCEEDED\"").await;
    for field in [
        "\"request_id\":\"a-watch\"",
        "\"messages\":2",
        "\"changes\":2",
        "\"bytes\":",
        "\"reason\":\"DEADLINE_EXCEEDED\"",
    ] {
        assert!(line.contains(field), "{field} is not in: {line}");
    }
}

#[tokio::test]
async fn watches_are_limited_per_user_and_per_client() {
    let app = App::start_with(config_with(|config| {
        config.limits.max_watches_per_user = 2;
        config.limits.max_watches_per_peer = 3;
    }))
    .await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let mut of_ana = vec![watch(&ana).await, watch(&ana).await];
    let rejected = ana.try_watch_todos(<_>::default()).await;
    let status = assert_status(rejected, Code::ResourceExhausted, "OVERLOADED");
    assert!(status.get_error_details().retry_info().is_some());
    let _of_bob = watch(&bob).await;
    let rejected = bob.try_watch_todos(<_>::default()).await;
    assert_status(rejected, Code::ResourceExhausted, "OVERLOADED");
    of_ana.pop();
    wait_until("a watch is free", async || ana.try_watch_todos(<_>::default()).await.is_ok()).await;
}

#[tokio::test]
async fn watches_end_thirty_seconds_after_the_last_poll() {
    let database = TestDatabase::create().await;
    let address = Proxy::reserve_address().await;
    let proxy = Proxy::open(address, &database.options).await;
    let options = proxy::options_via(address, &database.options);
    let app = App::start_via(database, options, config()).await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let mut stream = watch(&ana).await;
    // A short outage ends no watch, and loses no change.
    proxy.pause();
    let there = ana.clone().with_channel(&replica.channel);
    there.create_todo("b").await;
    proxy.resume();
    assert_eq!(described(&next_message(&mut stream).await.changes), ["b"]);
    proxy.pause();
    let started = Instant::now();
    // The other replica writes what this one cannot see.
    there.create_todo("c").await;
    let (messages, status) = rest_of(stream).await;
    assert_eq!(messages.len(), 1, "no checkpoint without a poll: {messages:?}");
    let ended = (messages[0].clone(), status);
    let resumed = assert_ended(&ended, Code::Unavailable, "DATABASE_UNAVAILABLE");
    let took = started.elapsed();
    assert!((28..45).contains(&took.as_secs()), "{took:?}");
    let mut stream = there.watch_todos(resumed.clone()).await;
    assert_eq!(described(&next_message(&mut stream).await.changes), ["c"]);
    proxy.resume();
    // The outage is no reason to end a watch that starts after it.
    let mut stream = ana.watch_todos(resumed).await;
    assert_eq!(described(&next_message(&mut stream).await.changes), ["c"]);
    there.create_todo("d").await;
    assert_eq!(described(&next_message(&mut stream).await.changes), ["d"]);
}

/// A migration locks a table for longer than a call may take.
#[tokio::test]
async fn a_watch_survives_a_lock_for_longer_than_a_call() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut stream =
        watch(&ana.clone().with_metadata("x-request-id", "a-watch-behind-a-lock")).await;
    // The watch reads the deleted todos, and CreateTodo does not.
    let lock = app.hold_lock("lock table todo_trash in access exclusive mode").await;
    ana.create_todo("a").await;
    let reads = statement_count("a-watch-behind-a-lock");
    wait_until("the read is repeated", async || {
        statement_count("a-watch-behind-a-lock") > reads + 1
    })
    .await;
    lock.release().await;
    assert_eq!(described(&next_message(&mut stream).await.changes), ["a"]);
}

#[tokio::test]
async fn the_watches_of_a_deleted_user_end_during_a_full_sync_too() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    for _ in 0..101 {
        ana.create_todo("a").await;
    }
    app.execute("update todos set description = repeat('a', 10000)").await;
    let endpoint = Endpoint::from_shared(format!("http://{}", app.address)).expect("a URL");
    let channel = endpoint.initial_stream_window_size(64 * 1024).connect().await;
    let slow = ana.clone().with_channel(&channel.expect("connected"));
    let mut stream = slow.watch_todos(WatchTodosRequest::default()).await;
    assert!(!next_message(&mut stream).await.caught_up);
    let there = ana.with_channel(&replica.channel);
    there.try_delete_user("me", "").await.expect("deleted");
    let (messages, status) = rest_of(stream).await;
    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
    let info = status.get_error_details().error_info().expect("details").clone();
    assert_eq!(info.reason, "SESSION_REVOKED");
    assert!(!messages.last().expect("a last message").cursor.is_empty());
}
