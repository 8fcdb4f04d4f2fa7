//! What the service takes on at once, and how long connections live.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::{
    config::Config,
    proto::{
        auth::v1::ListSessionsRequest,
        todo::v1::{ListTodosRequest, Todo},
    },
};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http2,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::support::{
    App, Client, PASSWORD,
    app::{config, connect, unique},
    assert::assert_refused,
    health::Watch,
    todos::titled,
    wait::{eventually, in_time},
};

/// What a client says first, and its settings, of which there are none.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A connection that has said this.
pub async fn raw(address: SocketAddr, said: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    // The server may close it at once.
    let _ = stream.write_all(said).await;
    stream
}

/// Waits until the server closes a connection; what it said before.
pub async fn closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    match in_time("the end of the connection", stream.read_to_end(&mut said)).await {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    said
}

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
    let app = App::start().await;
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
    let (trusting, plain) = (App::start_with(trusting).await, App::start().await);
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

#[tokio::test]
async fn who_does_not_read_answers_loses_the_connection_and_hurts_nobody() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let description = "x".repeat(10_000);
    for _ in 0..150 {
        ana.create(Todo { description: description.clone(), ..titled("a") }).await;
    }
    let all = ListTodosRequest { page_size: 1000, ..ListTodosRequest::default() };
    // Answers of a MiB each, far more than there is room for.
    let slow = SlowReader::begin(&app, &ana, &all, 64).await;
    for _ in 0..20 {
        ana.create_todo("b").await;
    }
    slow.until_closed().await;
    ana.list_todos(all).await;
}

/// A caller that asks for much and reads nothing.
struct SlowReader {
    connection: JoinHandle<hyper::Result<()>>,
    _unread: Vec<http::Response<Incoming>>,
}

impl SlowReader {
    async fn begin(app: &App, caller: &Client, request: &ListTodosRequest, calls: usize) -> Self {
        let stream = TcpStream::connect(app.address).await.expect("connected");
        let (mut sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(1024)
            .handshake(TokioIo::new(stream))
            .await
            .expect("HTTP/2");
        let connection = tokio::spawn(connection);
        let message = request.encode_to_vec();
        let length = u32::try_from(message.len()).expect("a small one");
        let frame = Bytes::from([&[0][..], &length.to_be_bytes(), &message].concat());
        let mut unread = Vec::new();
        for _ in 0..calls {
            let request = http::Request::post(format!(
                "http://{}/fastzero.todo.v1.TodoService/ListTodos",
                app.address
            ))
            .header("content-type", "application/grpc")
            .header("authorization", format!("Bearer {}", caller.tokens().access_token))
            .body(Full::new(frame.clone()))
            .expect("a request");
            let Ok(response) = sender.send_request(request).await else {
                break;
            };
            unread.push(response);
        }
        Self { connection, _unread: unread }
    }

    /// Waits until the server has had enough.
    async fn until_closed(self) {
        let _ = in_time("the end of the connection", self.connection).await.expect("no panic");
    }
}
