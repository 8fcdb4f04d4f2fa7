//! Clients that read watches slowly, or not at all.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fast_zero::proto::todo::v1::WatchTodosRequest;
use sqlx::AssertSqlSafe;
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Mutex,
    time::{interval, timeout},
};
use tonic::transport::Endpoint;

use crate::support::{
    App, Client,
    app::connect,
    changes::{Copy, next_message},
    http2::{self, Frame, connect_raw, frame, read_frame},
    postgres::TestDatabase,
    process::Binary,
    statements::statement_count,
    wait::wait_until,
};

const WATCH: &str = "/fastzero.todo.v1.TodoService/WatchTodos";

/// Inserts 200 todos of 10 KB each: ten messages of a watch.
async fn insert_pages(app: &App) {
    insert_todos(&app.database, 200).await;
}

/// Inserts todos of 10 KB each.
async fn insert_todos(database: &TestDatabase, todos: u32) {
    let statements = format!(
        "insert into todo_clocks select id, {todos} from users;
         insert into todos
         select id, gen_random_uuid(), 'a', 'a', repeat('a', 10000), '', 1, n
         from users, generate_series(1, {todos}) n"
    );
    let statements = sqlx::raw_sql(AssertSqlSafe(statements));
    statements.execute(&mut database.connect().await).await.expect("inserted");
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
    // The first page is smaller than the window.
    assert_eq!(statement_count("a-slow-watch"), 3, "the session, and two pages");
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
            if let Some(acknowledgment) = frame.ping_acknowledgment() {
                connection.write_all(&acknowledgment).await.expect("an open connection");
            }
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

/// Counts the bytes of all streams until the connection closes, and acknowledges the pings that
/// keep it open. No stream may end: neither by a status nor by a reset.
async fn count_bytes(
    mut connection: OwnedReadHalf,
    write: Arc<Mutex<OwnedWriteHalf>>,
    bytes: Arc<AtomicU64>,
) {
    while let Ok(frame) = read_frame(&mut connection).await {
        assert!(![http2::GOAWAY, http2::RST_STREAM].contains(&frame.kind), "{frame:?}");
        let ends = [http2::HEADERS, http2::DATA].contains(&frame.kind);
        assert!(!ends || frame.flags & http2::END_STREAM == 0, "{frame:?}");
        if let Some(acknowledgment) = frame.ping_acknowledgment() {
            write.lock().await.write_all(&acknowledgment).await.expect("an open connection");
        }
        if frame.kind == http2::DATA {
            bytes.fetch_add(frame.payload.len() as u64, Ordering::Relaxed);
        }
    }
}

/// Each reader could get 20 MB. A window that opens by a byte a second is not shut. With the first
/// watch, the user has as many as `MAX_WATCHES_PER_USER`.
#[tokio::test]
async fn readers_of_one_byte_a_second_cost_one_page_each() {
    const READERS: u32 = 15;
    const SECONDS: u32 = 70;
    const MAX_KIB: u64 = 512;
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let address = server.address().await.parse().expect("an address");
    let ana = Client::new(connect(address).await).signed_up("ana").await;
    insert_todos(&database, 2_000).await;
    // Later pages use the memory of the first one again.
    let mut first = ana.watch_todos(WatchTodosRequest::default()).await;
    next_message(&mut first).await;
    let before = server.memory_kib("VmRSS");

    let connection = connect_raw(address, http2::PREFACE).await;
    let (read, mut write) = connection.into_split();
    let authorization = format!("Bearer {}", ana.tokens().access_token);
    let block = http2::header_block(WATCH, &[("authorization", &authorization)]);
    let streams = (0..READERS).map(|number| number * 2 + 1);
    let mut calls = http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 1);
    for stream in streams.clone() {
        calls.extend(frame(http2::HEADERS, http2::END_HEADERS, stream, &block));
        let request = http2::length_prefixed(&[]);
        calls.extend(frame(http2::DATA, http2::END_STREAM, stream, &request));
    }
    write.write_all(&calls).await.expect("sent");
    let (write, bytes) = (Arc::new(Mutex::new(write)), Arc::<AtomicU64>::default());
    let reading = tokio::spawn(count_bytes(read, write.clone(), bytes.clone()));
    let (mut ticks, mut max) = (interval(Duration::from_secs(1)), 0);
    let more = streams.map(|stream| frame(http2::WINDOW_UPDATE, 0, stream, &1_u32.to_be_bytes()));
    let more: Vec<_> = more.flatten().collect();
    for _ in 0..SECONDS {
        ticks.tick().await;
        assert!(!reading.is_finished(), "the connection or a stream has ended");
        write.lock().await.write_all(&more).await.expect("an open connection");
        max = server.memory_kib("VmRSS").max(max);
    }
    wait_until("all streams are read", async || {
        assert!(!reading.is_finished(), "the connection or a stream has ended");
        bytes.load(Ordering::Relaxed) >= u64::from(READERS * SECONDS)
    })
    .await;
    let each = max.saturating_sub(before) / u64::from(READERS);
    println!("{each} KiB for each reader of one byte a second");
    assert!(each <= MAX_KIB, "{each} KiB");
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
