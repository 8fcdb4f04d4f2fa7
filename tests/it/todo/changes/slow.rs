//! Clients that read watches slowly, or not at all.

use std::time::{Duration, Instant};

use fast_zero::proto::todo::v1::WatchTodosRequest;
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};
use tonic::transport::Endpoint;

use crate::support::{
    App, Client,
    changes::{Copy, next_message},
    http2::{self, Frame, connect_raw, frame, read_frame},
    statements::statement_count,
    wait::wait_until,
};

const WATCH: &str = "/fastzero.todo.v1.TodoService/WatchTodos";

/// Inserts 200 todos of 10 KB each: eight messages of a watch.
async fn insert_pages(app: &App) {
    app.execute(
        "insert into todo_clocks select id, 2000 from users;
         insert into todos
         select id, gen_random_uuid(), 'a', 'a', repeat('a', 10000), '', 1, n
         from users, generate_series(1, 200) n",
    )
    .await;
}

#[tokio::test]
async fn a_slow_client_of_a_watch_costs_one_page() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert_pages(&app).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", app.address)).expect("a URL");
    let channel = endpoint.initial_stream_window_size(64 * 1024).connect().await;
    let slow = ana.with_channel(&channel.expect("connected"));
    let slow = slow.with_metadata("x-request-id", "a-slow-watch");
    let mut stream = slow.watch_todos(WatchTodosRequest::default()).await;
    wait_until("the first page is read", async || statement_count("a-slow-watch") > 0).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(statement_count("a-slow-watch"), 2, "the session, and a page");
    let mut copy = Copy::default();
    while copy.todos.len() < 200 {
        copy.apply(next_message(&mut stream).await);
    }
}

/// Opens a watch with a flow-control window of one byte.
async fn watch_unread(app: &App, client: &Client, extra: &[(&str, &str)]) -> TcpStream {
    let mut connection = connect_raw(app.address, http2::PREFACE).await;
    let authorization = format!("Bearer {}", client.tokens().access_token);
    let headers = [&[("authorization", &*authorization)], extra].concat();
    let call = [
        http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 1),
        frame(http2::HEADERS, http2::END_HEADERS, 1, &http2::header_block(WATCH, &headers)),
        frame(http2::DATA, http2::END_STREAM, 1, &http2::length_prefixed(&[])),
    ];
    connection.write_all(&call.concat()).await.expect("sent");
    connection
}

/// Reads until the watch is reset, and returns how long that took. The connection does not drain.
async fn time_until_reset(connection: &mut TcpStream, limit: Duration) -> Duration {
    let started = Instant::now();
    let reset = async {
        loop {
            let frame = read_frame(connection).await.expect("a frame");
            assert_ne!(frame.kind, http2::GOAWAY, "{frame:?}");
            if frame.kind == http2::RST_STREAM {
                assert_eq!(frame.stream, 1);
                return started.elapsed();
            }
        }
    };
    timeout(limit, reset).await.expect("a reset in time")
}

/// Makes another call on the connection.
async fn assert_usable(connection: &mut TcpStream) {
    let block = http2::header_block("/grpc.health.v1.Health/Check", &[]);
    let call = [
        http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 1_000),
        frame(http2::HEADERS, http2::END_HEADERS, 3, &block),
        frame(http2::DATA, http2::END_STREAM, 3, &http2::length_prefixed(&[])),
    ];
    connection.write_all(&call.concat()).await.expect("sent");
    let is_end =
        |frame: &Frame| frame.stream == 3 && frame.flags & http2::END_STREAM == http2::END_STREAM;
    loop {
        let frame = timeout(Duration::from_secs(10), read_frame(connection)).await;
        let frame = frame.expect("a frame in time").expect("a frame");
        assert_ne!(frame.kind, http2::GOAWAY, "{frame:?}");
        if is_end(&frame) {
            assert_eq!(frame.kind, http2::HEADERS);
            return;
        }
    }
}

#[tokio::test]
async fn a_watch_that_ends_unread_is_reset_alone() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert_pages(&app).await;
    let mut connection = watch_unread(&app, &ana, &[("grpc-timeout", "300m")]).await;
    let took = time_until_reset(&mut connection, Duration::from_secs(20)).await;
    assert!(took >= Duration::from_secs(5), "{took:?}");
    assert_usable(&mut connection).await;
}

#[tokio::test]
async fn a_stream_whose_window_stays_shut_is_reset_alone() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert_pages(&app).await;
    let mut connection = watch_unread(&app, &ana, &[]).await;
    let took = time_until_reset(&mut connection, Duration::from_secs(90)).await;
    assert!(took >= Duration::from_secs(59), "{took:?}");
    assert_usable(&mut connection).await;
}
