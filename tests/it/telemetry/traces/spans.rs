//! The spans of a call, and what they contain.

use fast_zero::proto::user::v1::GetUserRequest;
use opentelemetry_proto::tonic::trace::v1::{span::SpanKind, status::StatusCode};
use tonic::{Code, Request, client::Grpc, codegen::http::uri::PathAndQuery};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;

use super::{
    GET_USER, OTHER_TRACE, SPAN, TRACE, binary_exporting_to, call_line, channel, client, get_me,
    of_kind, status, trace_id, with_remote_parent,
};
use crate::support::{
    App, Client, PASSWORD,
    app::{SECRET_KEY, config_with, connect},
    assert::{assert_status, assert_unauthenticated},
    collector::{Attributes, Collector, attributes, hex},
    postgres::TestDatabase,
    process::Binary,
};

#[tokio::test]
async fn the_span_of_a_call_is_a_child_of_the_callers_span() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = binary_exporting_to(&database, &collector.url()).start();
    let ana = client(&server).await.signed_up("ana").await;
    // The first call looks up the session.
    get_me(&ana).await;
    let calling =
        with_remote_parent(&ana, TRACE, true).with_metadata("tracestate", "vendor=opaque,other=1");
    get_me(&calling.with_metadata("x-request-id", "me-1")).await;

    assert_eq!(trace_id(&call_line(&server, "me-1").await), TRACE);
    let spans = collector.wait_for_spans(TRACE, 2).await;
    let [call] = of_kind(&spans, SpanKind::Server)[..] else { panic!("{spans:#?}") };
    assert_eq!((&*call.name, &*hex(&call.parent_span_id)), (GET_USER, SPAN));
    assert_eq!(call.trace_state, "vendor=opaque,other=1");
    assert_eq!(status(call), StatusCode::Unset);
    let expected = [
        ("rpc.system.name", "grpc"),
        ("rpc.method", GET_USER),
        ("rpc.response.status_code", "OK"),
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
async fn the_spans_of_work_that_outlives_its_call_belong_to_the_call() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = binary_exporting_to(&database, &collector.url()).start();
    let anonymous = client(&server).await;
    anonymous.create_user("ana").await;
    with_remote_parent(&anonymous, TRACE, true)
        .logged_in("ana", PASSWORD)
        .await
        .expect("logged in");
    let spans = collector.wait_for_spans(TRACE, 3).await;
    let [call] = of_kind(&spans, SpanKind::Server)[..] else { panic!("{spans:#?}") };
    let work = of_kind(&spans, SpanKind::Client);
    assert_eq!(work.len(), 2, "the lookup and the new session: {spans:#?}");
    assert!(work.iter().all(|span| span.parent_span_id == call.span_id), "{spans:#?}");
}

#[tokio::test]
async fn server_errors_are_distinguished_from_client_errors() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = binary_exporting_to(&database, &collector.url()).start();
    let channel = channel(&server).await;
    let anonymous = with_remote_parent(&Client::new(channel.clone()), TRACE, true);
    let rejected = anonymous.users().get_user(GetUserRequest { id: "me".into() }).await;
    assert_status(rejected, Code::Unauthenticated, "NOT_AUTHENTICATED");
    let [rejected] = &collector.wait_for_spans(TRACE, 1).await[..] else { panic!("more spans") };
    assert_eq!((&*rejected.name, status(rejected)), (GET_USER, StatusCode::Unset));
    assert_eq!(attributes(rejected)["rpc.response.status_code"], "UNAUTHENTICATED");

    let mut client = Grpc::new(channel);
    client.ready().await.expect("ready");
    let mut request = Request::new(HealthCheckRequest::default());
    let parent = format!("00-{OTHER_TRACE}-{SPAN}-01").parse().expect("metadata");
    request.metadata_mut().insert("traceparent", parent);
    let codec = ProstCodec::<HealthCheckRequest, HealthCheckRequest>::default();
    let path = PathAndQuery::from_static("/any/path.that/does.not/Exist");
    client.unary(request, path, codec).await.expect_err("an error");
    let [unknown] = &collector.wait_for_spans(OTHER_TRACE, 1).await[..] else {
        panic!("more spans")
    };
    assert_eq!((&*unknown.name, status(unknown)), ("other", StatusCode::Error));
}

#[tokio::test]
async fn a_cancelled_call_is_recorded_as_cancelled() {
    let collector = Collector::start().await;
    let endpoint = Some(collector.url().parse().expect("a URL"));
    let app = App::start_with(config_with(|config| {
        config.listen.otel_exporter_otlp_endpoint = endpoint;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut lock = app.lock_todo(&todo.id).await;
    let calling = with_remote_parent(&ana, TRACE, true);
    let call = tokio::spawn(async move { calling.try_delete_todo(&todo.id, "").await });
    lock.wait_until_blocked_by(1).await;
    call.abort();
    // The shutdown exports pending spans.
    app.shut_down();
    let spans = collector.wait_for_spans(TRACE, 2).await;
    let [call] = of_kind(&spans, SpanKind::Server)[..] else { panic!("{spans:#?}") };
    assert_eq!(
        (status(call), &*attributes(call)["rpc.response.status_code"]),
        (StatusCode::Unset, "CANCELLED")
    );
}

#[tokio::test]
async fn calls_that_the_caller_does_not_sample_are_not_exported() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = binary_exporting_to(&database, &collector.url()).start();
    let ana = client(&server).await.signed_up("ana").await;
    get_me(&with_remote_parent(&ana, TRACE, false).with_metadata("x-request-id", "me-1")).await;
    assert_eq!(trace_id(&call_line(&server, "me-1").await), TRACE);
    // Spans are exported in the order in which they end.
    get_me(&with_remote_parent(&ana, OTHER_TRACE, true)).await;
    collector.wait_for_spans(OTHER_TRACE, 2).await;
    assert_eq!(collector.spans(TRACE), []);
}

#[tokio::test]
async fn probes_are_exported_only_if_the_caller_samples_them() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = binary_exporting_to(&database, &collector.url()).start();
    let channel = channel(&server).await;
    let check = async |parent: Option<String>| {
        let mut request = Request::new(HealthCheckRequest::default());
        if let Some(parent) = parent {
            let parent = parent.parse().expect("metadata");
            request.metadata_mut().insert("traceparent", parent);
        }
        HealthClient::new(channel.clone()).check(request).await.expect("a response");
    };
    check(None).await;
    check(Some(format!("00-{OTHER_TRACE}-{SPAN}-00"))).await;
    check(Some(format!("00-{TRACE}-{SPAN}-01"))).await;
    collector.wait_for_spans(TRACE, 1).await;
    let names: Vec<_> = collector.received().into_iter().map(|(_, span)| span.name).collect();
    assert_eq!(names, ["grpc.health.v1.Health/Check"]);
}

#[tokio::test]
async fn the_log_and_the_export_have_the_same_trace_id() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    for exports in [true, false] {
        let url = if exports { collector.url() } else { String::new() };
        let server = binary_exporting_to(&database, &url).start();
        let name = if exports { "ana" } else { "bob" };
        let ana = client(&server).await.signed_up(name).await;
        let invalid = format!("00-{TRACE}-{SPAN}-0");
        let twice = with_remote_parent(&ana, TRACE, true);
        get_me(&ana.clone().with_metadata("x-request-id", "none")).await;
        get_me(
            &ana.clone()
                .with_metadata("traceparent", &invalid)
                .with_metadata("x-request-id", "invalid"),
        )
        .await;
        get_me(&with_remote_parent(&twice, TRACE, true).with_metadata("x-request-id", "twice"))
            .await;
        get_me(&with_remote_parent(&ana, TRACE, false).with_metadata("x-request-id", "valid"))
            .await;
        let mut ids = Vec::new();
        for request_id in ["none", "invalid", "twice", "valid"] {
            ids.push(trace_id(&call_line(&server, request_id).await).to_owned());
        }
        assert_eq!(ids.pop().as_deref(), Some(TRACE));
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 3, "each is a new one: {ids:?}");
        assert!(!ids.contains(&TRACE.to_owned()), "{ids:?}");
        for id in ids.iter().filter(|_| exports) {
            let spans = collector.wait_for_spans(id, 2).await;
            let [call] = of_kind(&spans, SpanKind::Server)[..] else { panic!("{spans:#?}") };
            assert!(call.parent_span_id.is_empty(), "{call:#?}");
        }
    }
}

#[tokio::test]
async fn the_pretty_log_has_the_trace_id() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).env("LOG_FORMAT", "pretty").start();
    let line = server.wait_for_line("serving address=").await;
    let address = line.split_once("address=").and_then(|(_, rest)| rest.split(' ').next());
    let address = address.and_then(|address| address.parse().ok());
    let anonymous = Client::new(connect(address.expect("an address")).await);
    with_remote_parent(&anonymous, TRACE, false).create_user("ana").await;
    server.wait_for_line(&format!("trace_id={TRACE}")).await;
}

#[tokio::test]
async fn no_secret_is_exported() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    let server = binary_exporting_to(&database, &collector.url()).start();
    let anonymous = client(&server).await;
    let ana = anonymous.signed_up("ana").await;
    let wrong = anonymous.try_log_in("ana@example.com", "not the password").await;
    assert_unauthenticated(wrong, "INCORRECT_CREDENTIALS");
    let tokens = ana.refresh(&ana.tokens().refresh_token).await;
    ana.create_todo("a title").await;
    let (_, job) = ana.create_token(&["user.read"]).await;
    ana.clone().with_token(&job).get_user("me").await;
    get_me(&with_remote_parent(&ana, TRACE, true)).await;
    collector.wait_for_spans(TRACE, 2).await;
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
        &job,
        "nightly job",
        SECRET_KEY,
        "argon2id",
        "insert into",
    ] {
        assert!(!exported.contains(secret), "{secret} is in {exported}");
    }
}

#[tokio::test]
async fn spans_name_their_service() {
    let (database, collector) = (TestDatabase::create().await, Collector::start().await);
    for (trace, variable, value, name) in [
        (TRACE, "OTEL_SERVICE_NAME", "", "fast-zero"),
        (OTHER_TRACE, "OTEL_SERVICE_NAME", "todos", "todos"),
        ("1", "OTEL_RESOURCE_ATTRIBUTES", "service.name=tasks,team=blue", "tasks"),
    ] {
        let trace = format!("{trace:0>32}");
        let server = binary_exporting_to(&database, &collector.url()).env(variable, value).start();
        let anonymous = with_remote_parent(&client(&server).await, &trace, true);
        let rejected = anonymous.try_log_in("stranger", PASSWORD).await;
        assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
        collector.wait_for_spans(&trace, 1).await;
        let received = collector.received();
        let (resource, _) = received
            .iter()
            .find(|(_, span)| hex(&span.trace_id) == trace)
            .expect("an existing entry");
        assert_eq!(resource["service.name"], name);
        assert_eq!(resource["service.version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(resource.get("team").is_some(), name == "tasks");
    }
}
