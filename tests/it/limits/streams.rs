//! Server streams: backpressure, quotas, and the reasons for which they end. They call a service
//! that exists for tests only.

use std::time::{Duration, Instant};

use fast_zero::proto::{
    auth::v1::LogoutScope,
    test::v1::{CountRequest, CountResponse},
};
use prost::Message;
use tokio::io::AsyncWriteExt;
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status, Streaming, transport::Endpoint};
use tonic_health::pb::HealthCheckRequest;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest,
};

use super::assert_overloaded;
use crate::support::{
    App, Client, RpcResult,
    app::{adjusted, config, config_with, connect},
    assert::{assert_has_error_details, assert_status},
    http2::{self, connect_raw, frame, read_frame},
    metrics::config_with_metrics,
    postgres::TestDatabase,
    process::Binary,
    wait::{wait_until, with_timeout},
};

/// The maximum number of open streams of one client.
const MAX_STREAMS_PER_CLIENT: usize = 64;

const SILENT: CountRequest =
    CountRequest { messages: 0, padding_bytes: 0, then_silent: true, then_fails: false };

async fn count(caller: &Client, request: CountRequest) -> RpcResult<Streaming<CountResponse>> {
    caller.streams().count(request).await
}

/// Opens a stream that stays silent after its first message.
async fn silent(caller: &Client) -> Streaming<CountResponse> {
    let mut stream = count(caller, SILENT).await.expect("opened").into_inner();
    assert_eq!(next(&mut stream).await.number, 1);
    stream
}

async fn next(stream: &mut Streaming<CountResponse>) -> CountResponse {
    let message = with_timeout("a message", stream.message()).await;
    message.expect("no error").expect("a message")
}

/// Waits until the stream fails.
async fn failure(mut stream: Streaming<CountResponse>) -> Status {
    let status = with_timeout("the end of a stream", stream.message()).await;
    let status = status.expect_err("an error at the end");
    assert_has_error_details(&status);
    status
}

#[tokio::test]
async fn a_stream_delivers_its_messages_and_ends() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let request = CountRequest { messages: 1000, ..CountRequest::default() };
    let mut stream = count(&ana, request).await.expect("opened").into_inner();
    for number in 1..=1000 {
        assert_eq!(next(&mut stream).await.number, number);
    }
    assert_eq!(stream.message().await.expect("no error"), None);
}

#[tokio::test]
async fn an_error_in_a_stream_has_the_details_of_every_error() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let request = CountRequest { messages: 1, then_fails: true, ..CountRequest::default() };
    let mut stream = count(&ana, request).await.expect("opened").into_inner();
    next(&mut stream).await;
    let status = failure(stream).await;
    assert_eq!((status.code(), status.message()), (Code::Internal, "Internal error"));
}

/// The encoder of a stream drops the source of a status.
#[tokio::test]
async fn the_source_of_an_error_in_a_stream_is_logged() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let address = server.address().await.parse().expect("an address");
    let ana = Client::new(connect(address).await).signed_up("ana").await;
    let ana = ana.with_metadata("x-request-id", "a-stream-that-fails");
    let request = CountRequest { messages: 1, then_fails: true, ..CountRequest::default() };
    let mut stream = count(&ana, request).await.expect("opened").into_inner();
    next(&mut stream).await;
    failure(stream).await;
    let line = server.wait_for_line("the test asked for a failure").await;
    assert!(line.contains("\"level\":\"ERROR\""), "{line}");
    assert!(line.contains("\"request_id\":\"a-stream-that-fails\""), "{line}");
}

/// Clients such as grpc-go read the status of an error without messages only if the headers end
/// the stream.
#[tokio::test]
async fn an_error_before_the_first_message_ends_the_stream_with_its_headers() {
    let app = App::start().await;
    let mut stream = connect_raw(app.address, http2::PREFACE).await;
    let too_large = HealthCheckRequest { service: "x".repeat(5_000) };
    let message = http2::length_prefixed(&too_large.encode_to_vec());
    let block = http2::header_block("/grpc.health.v1.Health/Watch", &[]);
    let call = [
        frame(http2::HEADERS, http2::END_HEADERS, 1, &block),
        frame(http2::DATA, http2::END_STREAM, 1, &message),
    ];
    stream.write_all(&call.concat()).await.expect("sent");
    let response = loop {
        let frame = with_timeout("a frame", read_frame(&mut stream)).await.expect("a frame");
        if frame.stream == 1 {
            break frame;
        }
    };
    assert_eq!(response.kind, http2::HEADERS);
    assert_ne!(response.flags & http2::END_STREAM, 0, "{response:?}");
}

/// HTTP/2 takes a whole message when the client has a window for a part of it.
#[tokio::test]
async fn a_stream_that_is_not_read_to_its_end_drains_its_connection() {
    let app = App::start().await;
    let mut stream = connect_raw(app.address, http2::PREFACE).await;
    let symbol = b"fastzero.todo.v1.TodoService";
    let request = [&[0x22, u8::try_from(symbol.len()).expect("short")], &symbol[..]].concat();
    let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let call = [
        http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 1),
        frame(http2::HEADERS, http2::END_HEADERS, 1, &http2::header_block(path, &[])),
        frame(http2::DATA, http2::END_STREAM, 1, &http2::length_prefixed(&request)),
    ];
    stream.write_all(&call.concat()).await.expect("sent");
    let started = Instant::now();
    loop {
        let frame = with_timeout("GOAWAY", read_frame(&mut stream)).await.expect("a frame");
        if frame.kind == http2::GOAWAY {
            break;
        }
    }
    assert!(started.elapsed() > Duration::from_secs(4), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_stream_requires_an_access_token() {
    let app = App::start().await;
    let rejected = count(&app.anonymous(), SILENT).await;
    assert_status(rejected, Code::Unauthenticated, "NOT_AUTHENTICATED");
}

#[tokio::test]
async fn a_stream_ends_at_its_deadline() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let started = Instant::now();
    let stream = silent(&ana.with_metadata("grpc-timeout", "300m")).await;
    let status = failure(stream).await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(2), "{took:?}");
}

/// A unary call never takes as long as this stream lives.
#[tokio::test]
async fn a_stream_outlives_the_longest_call() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let started = Instant::now();
    let stream = silent(&ana.with_metadata("grpc-timeout", "7S")).await;
    assert_eq!(failure(stream).await.code(), Code::DeadlineExceeded);
    assert!(started.elapsed() > Duration::from_secs(6), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_slow_reader_applies_backpressure_to_its_handler() {
    const WINDOW_BYTES: u32 = 64 * 1024;
    const PADDING_BYTES: u32 = 16 * 1024;
    const READ: u32 = 200;
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let endpoint = Endpoint::from_shared(format!("http://{}", app.address)).expect("a URL");
    let channel = endpoint.initial_stream_window_size(WINDOW_BYTES).connect().await;
    let ana = ana.with_channel(&channel.expect("connected"));
    let request = CountRequest { padding_bytes: PADDING_BYTES, ..CountRequest::default() };
    let unread = count(&ana, request).await.expect("opened");
    // Without backpressure, the handler of the unread stream would run as far as this one.
    let mut reading = count(&ana, request).await.expect("opened").into_inner();
    let mut produced = 0;
    for _ in 0..READ {
        produced = next(&mut reading).await.produced;
    }
    // Each handler is ahead by the flow-control window of its stream and the HTTP/2 buffers.
    let ahead = produced - READ;
    assert!(ahead <= 2 * 4 * WINDOW_BYTES / PADDING_BYTES, "{ahead} messages ahead");
    drop(unread);
}

#[tokio::test]
async fn a_stream_ends_with_its_session_on_any_replica() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    let other_session = app.logged_in("ana").await;
    let here = silent(&ana).await;
    let there = silent(&ana.clone().with_channel(&replica.channel)).await;
    let mut unaffected = silent(&other_session.clone().with_channel(&replica.channel)).await;
    let started = Instant::now();
    ana.log_out(LogoutScope::ThisSession).await;
    assert_eq!(failure(here).await.code(), Code::Unauthenticated);
    let status = failure(there).await;
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    let more = tokio::time::timeout(Duration::from_millis(50), unaffected.message()).await;
    assert!(more.is_err(), "{more:?}");
}

#[tokio::test]
async fn a_shutdown_ends_streams() {
    let mut app = App::start_with(adjusted(config(), |config| {
        config.lifecycle.shutdown_grace_seconds = 60;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let stream = silent(&ana).await;
    let started = Instant::now();
    app.shut_down();
    assert_eq!(failure(stream).await.code(), Code::Unavailable);
    with_timeout("the end of the server", &mut app.server_task).await.expect("a clean stop");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn streams_are_limited_per_client() {
    let app = App::start_with(config_with_metrics()).await;
    let ana = app.signed_up("ana").await;
    let mut streams = Vec::new();
    for _ in 0..MAX_STREAMS_PER_CLIENT {
        streams.push(silent(&ana).await);
    }
    assert_overloaded(count(&ana, SILENT).await);
    // Streams hold no call permit.
    ana.create_todo("a").await;
    streams.pop();
    wait_until("a slot is free", async || count(&ana, SILENT).await.is_ok()).await;
}

/// As many streams as the server accepts, of clients behind a proxy, leave the memory budget to
/// unary calls.
#[tokio::test]
async fn open_streams_leave_memory_for_unary_calls() {
    const CLIENTS: usize = 1_024 / MAX_STREAMS_PER_CLIENT;
    let app = App::start_with(config_with(|config| {
        config.listen.trusted_proxies = vec!["127.0.0.1/32".parse().expect("a network")];
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let mut streams = Vec::new();
    for client in 0..CLIENTS {
        let channel = connect(app.address).await;
        let client_ip = format!("10.0.0.{client}");
        let client =
            ana.clone().with_channel(&channel).with_metadata("x-forwarded-for", &client_ip);
        for _ in 0..MAX_STREAMS_PER_CLIENT {
            streams.push(silent(&client).await);
        }
    }
    ana.create_todo("a").await;
    let beyond = ana.clone().with_metadata("x-forwarded-for", "10.0.1.1");
    assert_overloaded(count(&beyond, SILENT).await);
}

#[tokio::test]
async fn a_dropped_stream_drops_its_handler() {
    let app = App::start_with(config_with_metrics()).await;
    let ana = app.signed_up("ana").await;
    let stream = silent(&ana).await;
    let ended = "grpc_server_call_duration_seconds_count{\
        grpc_method=\"fastzero.test.v1.TestService/Count\",grpc_status=\"CANCELLED\"}";
    assert_eq!(app.scrape().await.get(ended), None);
    drop(stream);
    wait_until("the stream has ended", async || app.scrape().await.get(ended) == Some(1.0)).await;
}

#[tokio::test]
async fn reflection_streams_end_after_their_maximum_age() {
    let app = App::start().await;
    let request = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    // The client sends one request, and does not end its half of the stream.
    let requests = tokio_stream::once(request).chain(tokio_stream::pending());
    let mut client = ServerReflectionClient::new(app.channel.clone());
    let started = Instant::now();
    let mut responses =
        client.server_reflection_info(Request::new(requests)).await.expect("opened").into_inner();
    responses.message().await.expect("no error").expect("a response");
    let half = with_timeout("the silence", async {
        tokio::time::timeout(Duration::from_secs(15), responses.message()).await
    });
    assert!(half.await.is_err(), "it ends too early");
    let status =
        with_timeout("the end", responses.message()).await.expect_err("an error at the end");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(started.elapsed() >= Duration::from_secs(30), "{:?}", started.elapsed());
}

#[tokio::test]
async fn oversized_requests_of_system_services_are_rejected() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    let request = tonic_health::pb::HealthCheckRequest { service: "x".repeat(4 * 1024) };
    let rejected = raw.call("/grpc.health.v1.Health/Check", &request.encode_to_vec()).await;
    assert_status(rejected, Code::OutOfRange, "MESSAGE_TOO_LARGE");
}
