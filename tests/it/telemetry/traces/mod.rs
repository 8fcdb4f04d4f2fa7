//! Traces: propagated from the caller, logged and exported.

mod export;
mod spans;

use fast_zero::proto::user::v1::GetUserRequest;
use opentelemetry_proto::tonic::trace::v1::{Span, Status, span::SpanKind, status::StatusCode};
use tonic::transport::Channel;

use crate::support::{
    Client,
    app::connect,
    postgres::TestDatabase,
    process::{Binary, Process},
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const OTHER_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "00f067aa0ba902b7";
const GET_USER: &str = "fastzero.user.v1.UserService/GetUser";

/// Returns a server that exports to this collector soon after each call.
fn binary_exporting_to(database: &TestDatabase, url: &str) -> Binary {
    Binary::server(&database.url())
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        .env("OTEL_BSP_SCHEDULE_DELAY", "50")
}

async fn channel(server: &Process) -> Channel {
    connect(server.address().await.parse().expect("an address")).await
}

async fn client(server: &Process) -> Client {
    Client::new(channel(server).await)
}

/// Returns the client with a remote parent in this trace, sampled or not.
fn with_remote_parent(client: &Client, trace: &str, sampled: bool) -> Client {
    let flags = u8::from(sampled);
    client.clone().with_metadata("traceparent", &format!("00-{trace}-{SPAN}-{flags:02x}"))
}

async fn get_me(client: &Client) {
    client.users().get_user(GetUserRequest { id: "me".into() }).await.expect("a response");
}

fn of_kind(spans: &[Span], kind: SpanKind) -> Vec<&Span> {
    spans.iter().filter(|span| span.kind() == kind).collect()
}

fn status(span: &Span) -> StatusCode {
    span.status.as_ref().map_or(StatusCode::Unset, Status::code)
}

/// Returns the trace ID in a line of the log.
fn trace_id(line: &str) -> &str {
    let (_, rest) = line.split_once("\"trace_id\":\"").expect("the line has a trace");
    let id = rest.split('"').next().expect("a JSON string");
    assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
    assert!(id == id.to_lowercase() && !id.bytes().all(|byte| byte == b'0'), "{id}");
    id
}

/// Returns the log line of a call.
async fn call_line(server: &Process, request_id: &str) -> String {
    let line = server.wait_for_line(&format!("\"request_id\":\"{request_id}\"")).await;
    assert!(line.contains("\"message\":\"call\""), "{line}");
    line
}
