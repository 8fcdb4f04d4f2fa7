//! Traces: taken over from the caller, in the log, and exported.

use std::time::{Duration, Instant};

use fast_zero::{config::Config, proto::user::v1::GetUserRequest};
use nix::sys::signal::Signal;
use opentelemetry_proto::tonic::trace::v1::{Span, Status, span::SpanKind, status::StatusCode};
use tokio::net::TcpListener;
use tonic::{Code, Request, client::Grpc, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;

use crate::support::{
    App, Client, PASSWORD,
    app::{SECRET_KEY, config, connect},
    assert::{assert_refused, assert_unauthenticated},
    certificates::{Authority, Secret},
    collector::{Attributes, Collector, attributes, hex},
    postgres::TestDatabase,
    process::{Process, Run},
    proxy::Proxy,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const OTHER_TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SPAN: &str = "00f067aa0ba902b7";
const GET_USER: &str = "fastzero.user.v1.UserService/GetUser";

/// A server that exports to this collector, soon after each call.
fn exporting(database: &TestDatabase, url: &str) -> Run {
    Run::server(&database.url())
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        .env("OTEL_BSP_SCHEDULE_DELAY", "50")
}

async fn channel(server: &Process) -> Channel {
    connect(server.address().await.parse().expect("an address")).await
}

async fn client(server: &Process) -> Client {
    Client::new(channel(server).await)
}

/// The caller, in a span of this trace that it records, or does not.
fn within(client: &Client, trace: &str, recorded: bool) -> Client {
    let flags = u8::from(recorded);
    client.clone().with("traceparent", &format!("00-{trace}-{SPAN}-{flags:02x}"))
}

async fn get_me(client: &Client) {
    client.users().get_user(GetUserRequest { id: "me".into() }).await.expect("answered");
}

fn of_kind(spans: &[Span], kind: SpanKind) -> Vec<&Span> {
    spans.iter().filter(|span| span.kind() == kind).collect()
}

fn status(span: &Span) -> StatusCode {
    span.status.as_ref().map_or(StatusCode::Unset, Status::code)
}

/// The id of the trace in a line of the log.
fn trace_id(line: &str) -> &str {
    let (_, rest) = line.split_once("\"trace_id\":\"").expect("the line has a trace");
    let id = rest.split('"').next().expect("it is quoted");
    assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
    assert!(id == id.to_lowercase() && !id.bytes().all(|byte| byte == b'0'), "{id}");
    id
}

/// The line that the log has of a call.
async fn call_line(server: &Process, request_id: &str) -> String {
    let line = server.line(&format!("\"request_id\":\"{request_id}\"")).await;
    assert!(line.contains("\"message\":\"call\""), "{line}");
    line
}

#[tokio::test]
async fn the_span_of_a_call_is_a_child_of_its_callers() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = exporting(&database, &collector.url()).start();
    let ana = client(&server).await.signed_up("ana").await;
    // The first call looks for the session.
    get_me(&ana).await;
    let calling = within(&ana, TRACE, true).with("tracestate", "vendor=opaque,other=1");
    get_me(&calling.with("x-request-id", "me-1")).await;

    assert_eq!(trace_id(&call_line(&server, "me-1").await), TRACE);
    let spans = collector.until_trace(TRACE, 2).await;
    let [call] = of_kind(&spans, SpanKind::Server)[..] else { panic!("{spans:#?}") };
    assert_eq!((&*call.name, &*hex(&call.parent_span_id)), (GET_USER, SPAN));
    assert_eq!(call.trace_state, "vendor=opaque,other=1");
    assert_eq!(status(call), StatusCode::Unset);
    let expected = [
        ("rpc.system", "grpc"),
        ("rpc.service", "fastzero.user.v1.UserService"),
        ("rpc.method", "GetUser"),
        ("rpc.grpc.status_code", "0"),
        ("request_id", "me-1"),
        ("user.id", &ana.user_id()),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
    assert_eq!(attributes(call), Attributes::from(expected));

    let [work] = of_kind(&spans, SpanKind::Client)[..] else { panic!("{spans:#?}") };
    assert_eq!((&*work.name, &work.parent_span_id), ("postgresql", &call.span_id));
    let expected = [("db.system.name".to_owned(), "postgresql".to_owned())];
    assert_eq!(attributes(work), Attributes::from(expected));
    assert!(call.start_time_unix_nano <= work.start_time_unix_nano);
    assert!(work.start_time_unix_nano <= work.end_time_unix_nano);
    assert!(work.end_time_unix_nano <= call.end_time_unix_nano);
}

#[tokio::test]
async fn work_that_no_dropped_call_can_cut_belongs_to_its_call() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = exporting(&database, &collector.url()).start();
    let anonymous = client(&server).await;
    anonymous.create_user("ana").await;
    within(&anonymous, TRACE, true).logged_in("ana", PASSWORD).await.expect("logged in");
    let spans = collector.until_trace(TRACE, 3).await;
    let [call] = of_kind(&spans, SpanKind::Server)[..] else { panic!("{spans:#?}") };
    let work = of_kind(&spans, SpanKind::Client);
    assert_eq!(work.len(), 2, "the look-up and the new session: {spans:#?}");
    assert!(work.iter().all(|span| span.parent_span_id == call.span_id), "{spans:#?}");
}

#[tokio::test]
async fn failures_of_the_server_are_told_from_those_of_callers() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = exporting(&database, &collector.url()).start();
    let channel = channel(&server).await;
    let anonymous = within(&Client::new(channel.clone()), TRACE, true);
    let refused = anonymous.users().get_user(GetUserRequest { id: "me".into() }).await;
    assert_refused(refused, Code::Unauthenticated, "NOT_AUTHENTICATED");
    let [refused] = &collector.until_trace(TRACE, 1).await[..] else { panic!("more spans") };
    assert_eq!((&*refused.name, status(refused)), (GET_USER, StatusCode::Unset));
    assert_eq!(attributes(refused)["rpc.grpc.status_code"], "16");

    let mut client = Grpc::new(channel);
    client.ready().await.expect("ready");
    let mut request = Request::new(HealthCheckRequest::default());
    let parent = format!("00-{OTHER_TRACE}-{SPAN}-01").parse().expect("metadata");
    request.metadata_mut().insert("traceparent", parent);
    let codec = ProstCodec::<HealthCheckRequest, HealthCheckRequest>::default();
    let path = PathAndQuery::from_static("/any/path.that/does.not/Exist");
    client.unary(request, path, codec).await.expect_err("there is none");
    let [unknown] = &collector.until_trace(OTHER_TRACE, 1).await[..] else { panic!("more spans") };
    assert_eq!((&*unknown.name, status(unknown)), ("unknown", StatusCode::Error));
}

#[tokio::test]
async fn a_call_that_is_given_up_is_told_as_that() {
    let collector = Collector::start().await;
    let endpoint = Some(collector.url().parse().expect("a URL"));
    let app = App::start_with(Config { otel_exporter_otlp_endpoint: endpoint, ..config() }).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut lock = app.lock_todo(&todo.id).await;
    let calling = within(&ana, TRACE, true);
    let call = tokio::spawn(async move { calling.try_delete_todo(&todo.id, "").await });
    lock.until_queue_of(1).await;
    call.abort();
    // The stop exports what is left.
    app.stop();
    let spans = collector.until_trace(TRACE, 2).await;
    let [call] = of_kind(&spans, SpanKind::Server)[..] else { panic!("{spans:#?}") };
    assert_eq!(
        (status(call), &*attributes(call)["rpc.grpc.status_code"]),
        (StatusCode::Unset, "1")
    );
}

#[tokio::test]
async fn what_the_caller_does_not_record_is_not_exported() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = exporting(&database, &collector.url()).start();
    let ana = client(&server).await.signed_up("ana").await;
    get_me(&within(&ana, TRACE, false).with("x-request-id", "me-1")).await;
    assert_eq!(trace_id(&call_line(&server, "me-1").await), TRACE);
    // Spans are exported in the order in which they end.
    get_me(&within(&ana, OTHER_TRACE, true)).await;
    collector.until_trace(OTHER_TRACE, 2).await;
    assert_eq!(collector.trace(TRACE), []);
}

#[tokio::test]
async fn probes_are_exported_only_where_their_caller_records_them() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = exporting(&database, &collector.url()).start();
    let channel = channel(&server).await;
    let check = async |parent: Option<String>| {
        let mut request = Request::new(HealthCheckRequest::default());
        if let Some(parent) = parent {
            let parent = parent.parse().expect("metadata");
            request.metadata_mut().insert("traceparent", parent);
        }
        HealthClient::new(channel.clone()).check(request).await.expect("answered");
    };
    check(None).await;
    check(Some(format!("00-{OTHER_TRACE}-{SPAN}-00"))).await;
    check(Some(format!("00-{TRACE}-{SPAN}-01"))).await;
    collector.until_trace(TRACE, 1).await;
    let names: Vec<_> = collector.received().into_iter().map(|(_, span)| span.name).collect();
    assert_eq!(names, ["grpc.health.v1.Health/Check"]);
}

#[tokio::test]
async fn each_call_has_a_trace_in_the_log_and_the_same_in_the_export() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    for exports in [true, false] {
        let url = if exports { collector.url() } else { String::new() };
        let server = exporting(&database, &url).start();
        let name = if exports { "ana" } else { "bob" };
        let ana = client(&server).await.signed_up(name).await;
        let bad = format!("00-{TRACE}-{SPAN}-0");
        let twice = within(&ana, TRACE, true);
        get_me(&ana.clone().with("x-request-id", "none")).await;
        get_me(&ana.clone().with("traceparent", &bad).with("x-request-id", "bad")).await;
        get_me(&within(&twice, TRACE, true).with("x-request-id", "twice")).await;
        get_me(&within(&ana, TRACE, false).with("x-request-id", "good")).await;
        let mut ids = Vec::new();
        for request_id in ["none", "bad", "twice", "good"] {
            ids.push(trace_id(&call_line(&server, request_id).await).to_owned());
        }
        assert_eq!(ids.pop().as_deref(), Some(TRACE));
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 3, "each is a new one: {ids:?}");
        assert!(!ids.contains(&TRACE.to_owned()), "{ids:?}");
        for id in ids.iter().filter(|_| exports) {
            let spans = collector.until_trace(id, 2).await;
            let [call] = of_kind(&spans, SpanKind::Server)[..] else { panic!("{spans:#?}") };
            assert!(call.parent_span_id.is_empty(), "{call:#?}");
        }
    }
}

#[tokio::test]
async fn the_log_for_people_has_the_trace_too() {
    let database = TestDatabase::create().await;
    let server = Run::server(&database.url()).env("LOG_FORMAT", "pretty").start();
    let line = server.line("serving address=").await;
    let address = line.rsplit('=').next().and_then(|address| address.trim().parse().ok());
    let anonymous = Client::new(connect(address.expect("an address")).await);
    within(&anonymous, TRACE, false).create_user("ana").await;
    server.line(&format!("trace_id={TRACE}")).await;
}

#[tokio::test]
async fn no_secret_is_exported() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = exporting(&database, &collector.url()).start();
    let anonymous = client(&server).await;
    let ana = anonymous.signed_up("ana").await;
    let wrong = anonymous.try_log_in("ana@example.com", "not the password").await;
    assert_unauthenticated(wrong, "INCORRECT_CREDENTIALS");
    let tokens = ana.refresh(&ana.tokens().refresh_token).await;
    ana.create_todo("a title").await;
    get_me(&within(&ana, TRACE, true)).await;
    collector.until_trace(TRACE, 2).await;
    let exported = format!("{:?}", collector.received());
    for there in ["CreateUser", "Login", "RefreshToken", "CreateTodo", &ana.user_id()] {
        assert!(exported.contains(there), "{there} is not in {exported}");
    }
    let (mine, password) = (ana.tokens(), "not the password");
    for secret in [
        PASSWORD,
        password,
        "\"ana",
        "@example.com",
        "a title",
        &mine.access_token,
        &mine.refresh_token,
        &tokens.access_token,
        &tokens.refresh_token,
        SECRET_KEY,
        "argon2id",
        "insert into",
    ] {
        assert!(!exported.contains(secret), "{secret} is in {exported}");
    }
}

#[tokio::test]
async fn spans_say_which_service_they_come_from() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    for (trace, variable, value, name) in [
        (TRACE, "OTEL_SERVICE_NAME", "", "fast-zero"),
        (OTHER_TRACE, "OTEL_SERVICE_NAME", "todos", "todos"),
        ("1", "OTEL_RESOURCE_ATTRIBUTES", "service.name=tasks,team=blue", "tasks"),
    ] {
        let trace = format!("{trace:0>32}");
        let server = exporting(&database, &collector.url()).env(variable, value).start();
        let anonymous = within(&client(&server).await, &trace, true);
        let refused = anonymous.try_log_in("nobody", PASSWORD).await;
        assert_unauthenticated(refused, "INCORRECT_CREDENTIALS");
        collector.until_trace(&trace, 1).await;
        let received = collector.received();
        let (resource, _) =
            received.iter().find(|(_, span)| hex(&span.trace_id) == trace).expect("it is there");
        assert_eq!(resource["service.name"], name);
        assert_eq!(resource["service.version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(resource.get("team").is_some(), name == "tasks");
    }
}

#[tokio::test]
async fn the_stop_exports_what_is_left() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let run = exporting(&database, &collector.url()).env("OTEL_BSP_SCHEDULE_DELAY", "3600000");
    let mut server = run.start();
    let ana = client(&server).await.signed_up("ana").await;
    get_me(&within(&ana, TRACE, true)).await;
    assert_eq!(collector.received(), []);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().await.code(), Some(0));
    let spans = collector.trace(TRACE);
    assert_eq!(of_kind(&spans, SpanKind::Server).len(), 1, "{spans:#?}");
    assert!(!server.output().contains("may be lost"), "{}", server.output());
}

#[tokio::test]
async fn a_collector_that_is_away_or_silent_holds_neither_calls_nor_the_stop() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let silent_at = silent.local_addr().expect("it is bound");
    // Accepted connections stay open, and nobody reads them.
    let accepting = tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok((stream, _)) = silent.accept().await {
            open.push(stream);
        }
    });
    for address in [Proxy::reserve().await, silent_at] {
        let database = TestDatabase::create().await;
        let url = format!("http://{address}");
        // Full after a few calls.
        let run = exporting(&database, &url).env("OTEL_BSP_MAX_QUEUE_SIZE", "8");
        let mut server = run.start();
        let ana = client(&server).await.signed_up("ana").await;
        let mut longest = Duration::ZERO;
        for _ in 0..300 {
            let begun = Instant::now();
            get_me(&ana).await;
            longest = longest.max(begun.elapsed());
        }
        assert!(longest < Duration::from_millis(500), "{longest:?}");
        // A silent one may go on to be for a while, before that is a failure.
        let is_silent = address == silent_at;
        if !is_silent {
            server.line("traces cannot be exported").await;
        }
        let begun = Instant::now();
        server.signal(Signal::SIGTERM);
        assert_eq!(server.end().await.code(), Some(0), "{}", server.output());
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        let output = server.output();
        assert_eq!(output.contains("the last traces may be lost"), is_silent, "{output}");
        assert!(output.matches("traces cannot be exported").count() <= 1, "{output}");
    }
    accepting.abort();
}

#[tokio::test]
async fn a_silent_collector_does_not_hold_the_second_signal() {
    let silent = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", silent.local_addr().expect("it is bound"));
    let database = TestDatabase::create().await;
    let run = exporting(&database, &url).env("SHUTDOWN_DELAY_SECONDS", "3600");
    let mut server = run.start();
    let ana = client(&server).await.signed_up("ana").await;
    get_me(&ana).await;
    server.signal(Signal::SIGTERM);
    server.line("stopping").await;
    let begun = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.end().await.code(), Some(1));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_collector_that_comes_back_is_told_of() {
    let (database, address) = (TestDatabase::create().await, Proxy::reserve().await);
    let server = exporting(&database, &format!("http://{address}")).start();
    let ana = client(&server).await.signed_up("ana").await;
    server.line("traces cannot be exported").await;
    let _collector =
        Collector::start_on(TcpListener::bind(address).await.expect("the port is still free"));
    get_me(&ana).await;
    server.line("traces are exported again").await;
}

#[tokio::test]
async fn a_collector_with_tls_needs_a_certificate_of_a_known_authority() {
    let database = TestDatabase::create().await;
    let authority = Authority::new();
    let secret = Secret::new(&authority.pair(), None);
    let with_tls = secret.variables().into_iter();
    let with_tls =
        with_tls.fold(Run::server(&database.url()), |run, (name, path)| run.env(name, &path));
    let with_tls = with_tls.start();
    let url = format!("https://{}", with_tls.address().await);
    let server = exporting(&database, &url).start();
    client(&server).await.create_user("ana").await;
    let line = server.line("traces cannot be exported").await;
    assert!(line.contains("UnknownIssuer"), "{line}");
}
