//! What the service takes on at once, and how long connections live.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::{
    config::Config,
    proto::{
        auth::v1::ListSessionsRequest,
        todo::v1::{CreateTodoRequest, ListTodosRequest, Todo, UpdateTodoRequest},
    },
};
use hyper::body::Incoming;
use prost::Message;
use prost_types::FieldMask;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::interval,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::support::{
    App, Client, PASSWORD,
    app::{connect, unique},
    assert::assert_refused,
    health::Watch,
    http2::{
        self, END_HEADERS, END_STREAM, OTHER_PEER, PREFACE, closed, deaf, frame, message,
        next_frame, raw,
    },
    metrics::with_metrics as config,
    parallel::at_once,
    todos::{Answer, titled},
    wait::{eventually, in_time},
    wire::{Wire, endless, outcome, whole},
};

/// Whether the server speaks on a new connection.
async fn is_taken(address: SocketAddr) -> Option<TcpStream> {
    let mut stream = raw(address, PREFACE).await;
    let mut first = [0; 9];
    let taken = in_time("an answer", stream.read_exact(&mut first)).await.is_ok();
    taken.then_some(stream)
}

#[tokio::test]
async fn a_peer_gets_so_many_connections_and_no_more() {
    for limited in [
        Config { max_connections_per_peer: 3, ..config() },
        Config { max_connections: 3, ..config() },
    ] {
        // The application under test has one itself.
        let app = App::start_with(limited).await;
        let one = is_taken(app.address).await.expect("the second");
        let _other = is_taken(app.address).await.expect("the third");
        assert!(is_taken(app.address).await.is_none(), "the fourth");
        app.anonymous().create_user("ana").await;
        drop(one);
        eventually("a place is free", async || is_taken(app.address).await.is_some()).await;
    }
}

#[tokio::test]
async fn who_says_nothing_or_nonsense_is_closed() {
    let app = App::start_with(config()).await;
    let begun = Instant::now();
    assert_eq!(
        closed(&mut raw(app.address, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await).await,
        b""
    );
    assert!(begun.elapsed() < Duration::from_secs(4), "nonsense, at once");
    for said in [&b""[..], b"PRI * HTTP/2.0"] {
        assert_eq!(closed(&mut raw(app.address, said).await).await, b"", "half of it");
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn calls_beyond_the_limit_are_turned_away_but_health_is_not() {
    let app = App::start_with(Config { max_concurrent_calls: 2, ..config() }).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut lock = app.lock_todo(&todo.id).await;
    let update = || {
        let (ana, todo) = (ana.clone(), Todo { etag: String::new(), ..todo.clone() });
        tokio::spawn(async move { ana.try_update_todo(Some(todo), Some(&["title"])).await })
    };
    let held = [update(), update()];
    lock.until_queue_of(2).await;

    let begun = Instant::now();
    let refused = ana.try_list_todos(ListTodosRequest::default()).await;
    let refused = assert_refused(refused, Code::ResourceExhausted, "OVERLOADED");
    assert!(refused.get_error_details().retry_info().is_some(), "{refused:?}");
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let mut health = HealthClient::new(app.channel.clone());
    health.check(HealthCheckRequest::default()).await.expect("health answers");

    lock.release().await;
    for held in held {
        held.await.expect("no panic").expect("who was let in is answered");
    }
    ana.try_list_todos(ListTodosRequest::default()).await.expect("there is room again");
}

#[tokio::test]
async fn a_connection_ends_with_age_and_no_call_with_it() {
    let app = App::start_with(Config { connection_max_age_seconds: 1, ..config() }).await;
    let ana = app.signed_up("ana").await;
    let channel = connect(app.address).await;
    let mut health = HealthClient::new(channel.clone());
    let watch = health.watch(HealthCheckRequest::default()).await.expect("it begins");
    let mut watch = Watch(watch.into_inner());
    let ended = in_time("the end of the stream", watch.until_ended()).await;
    assert_eq!(ended.map(|status| status.code()), Some(Code::Unavailable));
    // The channel connects anew by itself.
    let ana = ana.through(&channel);
    for _ in 0..10 {
        ana.create_todo("a").await;
    }
}

#[tokio::test]
async fn a_connection_without_calls_ends() {
    let app = App::start_with(Config { connection_idle_seconds: 1, ..config() }).await;
    let begun = Instant::now();
    let mut idle = is_taken(app.address).await.expect("taken");
    let goaway = closed(&mut idle).await;
    // The type of a frame is its fourth byte.
    assert!(goaway.windows(4).any(|bytes| bytes[3] == 0x07), "{goaway:?}");
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_trusted_proxy_names_whom_it_speaks_for() {
    let trusting = Config {
        trusted_proxies: vec![
            "127.0.0.0/8".parse().expect("a network"),
            "10.0.0.0/8".parse().expect("a network"),
        ],
        ..config()
    };
    let (trusting, plain) = (App::start_with(trusting).await, App::start_with(config()).await);
    for (app, forwarded, expected) in [
        (&trusting, "192.0.2.7", "192.0.2.7"),
        (&trusting, "198.51.100.1, 192.0.2.7, 10.1.2.3", "192.0.2.7"),
        (&trusting, "192.0.2.7, nobody", "127.0.0.1"),
        (&trusting, "10.0.0.1", "10.0.0.1"),
        (&trusting, "192.0.2.7, é, 198.51.100.1", "198.51.100.1"),
        (&plain, "192.0.2.7", "127.0.0.1"),
    ] {
        let name = unique("ana");
        app.create_user(&name).await;
        let proxied = app.anonymous().with("x-forwarded-for", forwarded);
        let ana = proxied.logged_in(&name, PASSWORD).await.expect("logged in");
        assert_eq!(peer_of(&ana).await, expected, "{forwarded}");
    }
}

/// Where the caller's session was opened from.
async fn peer_of(client: &Client) -> String {
    let sessions = client
        .auth()
        .list_sessions(ListSessionsRequest::default())
        .await
        .expect("listed")
        .into_inner();
    sessions.sessions.into_iter().next().expect("one").peer
}

#[tokio::test]
async fn a_stop_waits_until_it_is_known() {
    let app = App::start_with(Config { shutdown_delay_seconds: 2, ..config() }).await;
    let ana = app.signed_up("ana").await;
    let mut watch = app.watch("").await;
    in_time("SERVING", watch.until_serving()).await;
    app.stop();
    in_time("NOT_SERVING", watch.until_not_serving()).await;
    // New connections and calls are still served.
    let late = ana.through(&connect(app.address).await);
    late.create_todo("late").await;
}

const CREATE: &str = "/fastzero.todo.v1.TodoService/CreateTodo";
const GET: &str = "/fastzero.todo.v1.TodoService/GetTodo";
const LIST: &str = "/fastzero.todo.v1.TodoService/ListTodos";
const UPDATE: &str = "/fastzero.todo.v1.TodoService/UpdateTodo";

/// Somebody with a list of a MiB.
async fn signed_up_with_much(app: &App) -> Client {
    let ana = app.signed_up("ana").await;
    let description = "x".repeat(10_000);
    for _ in 0..110 {
        ana.create(Todo { description: description.clone(), ..titled("a") }).await;
    }
    ana
}

/// The request for it.
fn all() -> ListTodosRequest {
    ListTodosRequest { page_size: 1000, ..ListTodosRequest::default() }
}

/// The same caller from another address, who reads a KiB of each answer.
async fn other_peer(app: &App, caller: &Client) -> Wire {
    let wire = Wire::connect_from(OTHER_PEER, app.address, 1024).await;
    wire.expect("connected").with_token_of(caller)
}

/// Asks so often for everything and reads nothing: the answers, and how many calls were
/// turned away.
async fn unread(wire: &Wire, calls: usize) -> (Vec<http::Response<Incoming>>, usize) {
    let calls = (0..calls).map(|_| {
        let mut wire = wire.clone();
        async move { wire.send(LIST, whole(message(&all().encode_to_vec()))).await }
    });
    let (mut unread, mut refused) = (Vec::new(), 0);
    for response in at_once(calls).await {
        let response = response.expect("an answer");
        if response.headers().contains_key("grpc-status") {
            assert_overloaded(outcome(response).await);
            refused += 1;
        } else {
            unread.push(response);
        }
    }
    (unread, refused)
}

fn assert_overloaded<T>(refused: Answer<T>) {
    let refused = assert_refused(refused, Code::ResourceExhausted, "OVERLOADED");
    assert!(refused.get_error_details().retry_info().is_some(), "{refused:?}");
}

#[tokio::test]
async fn who_reads_nothing_leaves_room_for_others() {
    let app = App::start_with(config()).await;
    let ana = signed_up_with_much(&app).await;
    // Twice: what was taken comes back.
    for _ in 0..2 {
        let other = other_peer(&app, &ana).await;
        let (unread, refused) = unread(&other, 20).await;
        assert_eq!((unread.len(), refused), (12, 8));
        ana.list_todos(all()).await;
        drop((other, unread));
        app.until_connected(1).await;
    }
}

#[tokio::test]
async fn requests_that_are_almost_whole_leave_room_for_others() {
    let app = App::start_with(config()).await;
    let ana = signed_up_with_much(&app).await;
    let mut large = message(&vec![0; 1024 * 1024]);
    let last = large.pop().expect("a byte");
    for _ in 0..2 {
        let other = other_peer(&app, &ana).await;
        let mut calls = JoinSet::new();
        for _ in 0..12 {
            let (mut wire, almost) = (other.clone(), large.clone());
            calls.spawn(async move { wire.send(CREATE, endless(almost)).await });
        }
        let refused = in_time("a refusal", calls.join_next()).await.expect("one");
        let refused = refused.expect("no panic").expect("an answer");
        assert_overloaded(outcome(refused).await);
        ana.list_todos(all()).await;
        let mut wire = app.wire().await.with_token_of(&ana);
        let whole = whole([&large[..], &[last]].concat());
        let read = wire.send(CREATE, whole).await.expect("an answer");
        let read = outcome(read).await.expect_err("no good request");
        assert_eq!(read.code(), Code::Internal, "read, and no to-do: {read:?}");
        calls.shutdown().await;
        drop(other);
        app.until_under_way(0).await;
    }
}

#[tokio::test]
async fn calls_without_a_body_hold_no_place() {
    let app = App::start_with(Config { max_concurrent_calls: 2, ..config() }).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let wire = app.wire().await.with_token_of(&ana).with("grpc-timeout", "4S");
    let mut silent = JoinSet::new();
    for _ in 0..50 {
        let mut wire = wire.clone();
        silent.spawn(async move { wire.send(GET, endless("")).await });
    }
    let in_flight = async || app.scrape().await.get("fastzero_calls_in_flight");
    app.until_under_way(50).await;
    ana.get_todo(&todo.id).await;
    assert_eq!(in_flight().await, Some(50.0), "they are still there");
    while let Some(ended) = in_time("the deadline", silent.join_next()).await {
        let ended = outcome(ended.expect("no panic").expect("an answer")).await;
        assert_refused(ended, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
}

#[tokio::test]
async fn metadata_take_memory_as_messages_do() {
    let app = App::start_with(config()).await;
    let ana = app.signed_up("ana").await;
    for (length, all_come) in [(15, true), (15_000, false)] {
        let mut calls = JoinSet::new();
        for _ in 0..3 {
            let wire = other_peer(&app, &ana).await.with("a", "x".repeat(length));
            for _ in 0..80 {
                let mut wire = wire.clone();
                calls.spawn(async move { wire.send(GET, endless("")).await });
            }
        }
        if all_come {
            app.until_under_way(240).await;
        } else {
            let refused = in_time("a refusal", calls.join_next()).await.expect("one");
            assert_overloaded(outcome(refused.expect("no panic").expect("an answer")).await);
        }
        calls.shutdown().await;
        app.until_under_way(0).await;
    }
}

#[tokio::test]
async fn a_connection_that_is_stuck_ends_after_its_other_calls() {
    let app = App::start_with(config()).await;
    let ana = signed_up_with_much(&app).await;
    let todo = ana.create_todo("a").await;
    let lock = app.lock_todo(&todo.id).await;
    let bearer = format!("Bearer {}", ana.tokens().access_token);
    let block = |path| http2::call(path, &[("authorization", &bearer)]);
    let call = |path, stream, bytes: &[u8]| {
        let headers = frame(http2::HEADERS, END_HEADERS, stream, &block(path));
        [headers, frame(http2::DATA, END_STREAM, stream, &message(bytes))].concat()
    };
    let mut stream = raw(app.address, PREFACE).await;
    let window = http2::setting(http2::INITIAL_WINDOW_SIZE, 1024);
    let list = call(LIST, 1, &all().encode_to_vec());
    stream.write_all(&[window, list].concat()).await.expect("sent");

    // One call a second, each of which waits, until the server has had enough.
    let update = UpdateTodoRequest {
        todo: Some(Todo { etag: String::new(), ..todo }),
        update_mask: Some(FieldMask { paths: vec!["title".to_owned()] }),
    };
    let (mut newest, mut ticks) = (1, interval(Duration::from_secs(1)));
    let goaway = async {
        loop {
            tokio::select! {
                frame = next_frame(&mut stream) => {
                    if frame.expect("a frame").kind == http2::GOAWAY {
                        return;
                    }
                }
                _ = ticks.tick() => {
                    newest += 2;
                    let update = call(UPDATE, newest, &update.encode_to_vec());
                    stream.write_all(&update).await.expect("sent");
                }
            }
        }
    };
    in_time("GOAWAY", goaway).await;
    lock.release().await;
    let answered = async {
        loop {
            let frame = next_frame(&mut stream).await.expect("a frame");
            // An error would have no message.
            if frame.stream == newest && frame.kind == http2::DATA {
                return;
            }
        }
    };
    in_time("the answer", answered).await;
    closed(&mut stream).await;
    ana.list_todos(all()).await;
}

#[tokio::test]
async fn who_does_not_even_read_errors_is_cut() {
    let app = App::start_with(config()).await;
    let mut stream = deaf(app.address, OTHER_PEER).await.expect("connected");
    stream.write_all(PREFACE).await.expect("sent");
    let block = http2::call("/no.Such/Method", &[]);
    let calls = async {
        for stream_id in (1..).step_by(2) {
            let call = frame(http2::HEADERS, END_HEADERS | END_STREAM, stream_id, &block);
            if stream.write_all(&call).await.is_err() {
                return;
            }
        }
    };
    in_time("the end of the connection", calls).await;
}

#[tokio::test]
async fn health_is_limited_for_each_peer() {
    let app = App::start_with(config()).await;
    let mut watching = Vec::new();
    let refused = 'refused: loop {
        let mut wire = Wire::connect_from(OTHER_PEER, app.address, None).await.expect("connected");
        for _ in 0..100 {
            let watch = wire.send("/grpc.health.v1.Health/Watch", whole(message(b""))).await;
            let watch = watch.expect("an answer");
            if watch.headers().contains_key("grpc-status") {
                break 'refused outcome(watch).await;
            }
            watching.push((wire.clone(), watch));
        }
    };
    assert_overloaded(refused);
    assert_eq!(watching.len(), 256);
    let mut health = HealthClient::new(app.channel.clone());
    health.check(HealthCheckRequest::default()).await.expect("of another peer");
}

#[tokio::test]
async fn a_message_that_is_cut_is_an_error_and_changes_nothing() {
    let app = App::start_with(config()).await;
    let ana = app.signed_up("ana").await;
    let mut wire = app.wire().await.with_token_of(&ana);
    let todo = CreateTodoRequest { todo: Some(titled("a")) };
    let message = message(&todo.encode_to_vec());
    for length in [0, 1, 4, 5, message.len() - 1] {
        let cut = wire.send(CREATE, whole(message[..length].to_vec())).await.expect("an answer");
        let refused = outcome(cut).await.expect_err("an error");
        assert!(refused.get_error_details().error_info().is_some(), "{refused:?}");
    }
    assert_eq!(ana.all_todos(ListTodosRequest::default()).await, []);
    outcome(wire.send(CREATE, whole(message)).await.expect("an answer")).await.expect("added");
}

#[tokio::test]
async fn a_wrong_length_ends_its_call_only() {
    let app = App::start_with(config()).await;
    let mut stream = raw(app.address, PREFACE).await;
    for (id, length) in [(1, "100"), (3, "5")] {
        let block = http2::call("/grpc.health.v1.Health/Check", &[("content-length", length)]);
        let headers = frame(http2::HEADERS, END_HEADERS, id, &block);
        let data = frame(http2::DATA, END_STREAM, id, &message(b""));
        stream.write_all(&[headers, data].concat()).await.expect("sent");
        let kind = loop {
            let frame = in_time("an answer", next_frame(&mut stream)).await.expect("a frame");
            if frame.stream == id && frame.kind != http2::WINDOW_UPDATE {
                break frame.kind;
            }
        };
        let expected = if id == 1 { http2::RST_STREAM } else { http2::HEADERS };
        assert_eq!(kind, expected, "call {id}");
    }
}
