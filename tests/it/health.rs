//! The health service, reflection, and when the server starts and stops.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::{
    config::Config,
    database::MIGRATIONS,
    proto::todo::v1::{ListTodosRequest, Todo},
    server::{Backing, Server},
    types::error_chain::BoxError,
};
use prost::Message;
use prost_types::FileDescriptorProto;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, ServerReflectionResponse, server_reflection_request::MessageRequest,
    server_reflection_response::MessageResponse,
};
use tonic_types::StatusExt;

use crate::support::{
    App, Client,
    app::{config, connect, keyring},
    assert::assert_refused,
    health::Watch,
    postgres::TestDatabase,
    todos::{Answer, titled, without_message},
    wait::{eventually, in_time},
    wire::Wire,
};

/// The names that need the database.
const READINESS: [&str; 4] = [
    "",
    "fastzero.auth.v1.AuthService",
    "fastzero.todo.v1.TodoService",
    "fastzero.user.v1.UserService",
];
const LIVENESS: &str = "liveness";
const REFLECTION: [&str; 2] = ["v1", "v1alpha"];

async fn try_check(channel: &Channel, service: &str) -> Answer<HealthCheckResponse> {
    let request = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(channel.clone()).check(request).await
}

pub async fn check(channel: &Channel, service: &str) -> ServingStatus {
    try_check(channel, service).await.expect("a known service").into_inner().status()
}

#[tokio::test]
async fn every_service_is_serving() {
    let app = App::start().await;
    for service in READINESS.into_iter().chain([LIVENESS]) {
        assert_eq!(check(&app.channel, service).await, ServingStatus::Serving, "{service}");
        in_time("SERVING", app.watch(service).await.until_serving()).await;
    }
}

#[tokio::test]
async fn an_unknown_service_is_not_found() {
    let app = App::start().await;
    for service in ["no.such.Service", "TodoService", "fastzero.todo.v1", "Liveness", " "] {
        let refused = try_check(&app.channel, service).await;
        assert_refused(refused, Code::NotFound, "SERVICE_UNKNOWN");
        let request = HealthCheckRequest { service: service.to_owned() };
        let refused = HealthClient::new(app.channel.clone()).watch(request).await;
        assert_refused(refused, Code::NotFound, "SERVICE_UNKNOWN");
    }
}

/// A Watch on each service that needs the database, which has told that it is SERVING.
async fn watch_readiness(app: &App) -> Vec<Watch> {
    let mut watches = Vec::new();
    for service in READINESS {
        let mut watch = app.watch(service).await;
        in_time("SERVING", watch.until_serving()).await;
        watches.push(watch);
    }
    watches
}

#[tokio::test]
async fn readiness_follows_the_schema_and_liveness_does_not() {
    let app = App::start().await;
    let mut watches = watch_readiness(&app).await;
    app.execute(
        "create table kept as table _sqlx_migrations;
         delete from _sqlx_migrations where version = (select max(version) from kept)",
    )
    .await;
    for watch in &mut watches {
        in_time("NOT_SERVING", watch.until_not_serving()).await;
    }
    assert_eq!(check(&app.channel, "").await, ServingStatus::NotServing);
    assert_eq!(check(&app.channel, LIVENESS).await, ServingStatus::Serving);
    app.execute(
        "insert into _sqlx_migrations
         select * from kept where version = (select max(version) from kept)",
    )
    .await;
    for watch in &mut watches {
        in_time("SERVING", watch.until_serving()).await;
    }
    assert_eq!(check(&app.channel, LIVENESS).await, ServingStatus::Serving);
}

/// The process of PostgreSQL's that the looks at the database are made in.
async fn looked_at_by(app: &App) -> Option<i32> {
    app.select(
        "select max(pid) from pg_stat_activity where datname = current_database()
            and application_name = 'fast-zero' and query like '%from _sqlx_migrations%'",
    )
    .await
}

#[tokio::test]
async fn a_connection_that_was_closed_is_no_outage() {
    let app = App::start().await;
    let mut watch = app.watch("").await;
    in_time("SERVING", watch.until_serving()).await;
    eventually("a look", async || looked_at_by(&app).await.is_some()).await;
    let before = looked_at_by(&app).await;
    app.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and application_name = 'fast-zero'",
    )
    .await;
    let looks_again = eventually("another look", async || {
        let now = looked_at_by(&app).await;
        now.is_some() && now != before
    });
    tokio::select! {
        () = watch.until_not_serving() => panic!("the database is there"),
        () = looks_again => {}
    }
    // The look has found out that those of calls are closed, too.
    app.create_user("ana").await;
}

/// A server from its first moment on, which may never serve.
struct Starting {
    address: SocketAddr,
    running: JoinHandle<Result<(), BoxError>>,
    _stop: DropGuard,
}

async fn begin(database: &TestDatabase, config: Config) -> Starting {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let backing = Backing { database: database.options.clone(), keyring: keyring() };
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone().drop_guard();
    let running = async move {
        let server = Server::start(listener, &config).await?;
        server.run(&config, backing, |_| (), shutdown).await
    };
    Starting { address, running: tokio::spawn(running), _stop: stop }
}

#[tokio::test]
async fn before_the_migration_the_server_lives_but_is_not_serving() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let starting = begin(&database, Config { migrate_on_start: false, ..config() }).await;
    let channel = connect(starting.address).await;
    for service in READINESS {
        assert_eq!(check(&channel, service).await, ServingStatus::NotServing, "{service}");
    }
    assert_eq!(check(&channel, LIVENESS).await, ServingStatus::Serving);
    let wire = Wire::connect(starting.address).await;
    let refused = wire.call("/fastzero.auth.v1.AuthService/Login", &[]).await;
    let status = assert_refused(refused, Code::Unavailable, "DATABASE_UNAVAILABLE");
    assert!(status.get_details_retry_info().is_some());
    let refused = wire.call("/fastzero.auth.v1.AuthService/Nothing", &[]).await;
    assert_refused(refused, Code::Unimplemented, "UNIMPLEMENTED");

    MIGRATIONS.run(&mut database.connect().await).await.expect("migrated");
    eventually("the schema is noticed", async || {
        check(&channel, "").await == ServingStatus::Serving
    })
    .await;
    let listed = Client::new(channel).try_list_todos(ListTodosRequest::default()).await;
    assert_refused(listed, Code::Unauthenticated, "NOT_AUTHENTICATED");
}

#[tokio::test]
async fn a_database_that_cannot_hold_all_texts_is_refused() {
    for encoding in ["LATIN1", "SQL_ASCII", "WIN1251", "EUC_JP"] {
        let options = format!("template template0 encoding '{encoding}' locale 'C'");
        let database = TestDatabase::create_empty(&options).await;
        let starting = begin(&database, config()).await;
        let ended = in_time("the refusal", starting.running).await;
        let error = ended.expect("no panic").expect_err("refused").to_string();
        // It says what is wrong, and not how the server stumbled over it.
        assert!(error.contains(&format!("encoding is {encoding}")), "{encoding}: {error}");
        assert!(error.contains("must be UTF8"), "{encoding}: {error}");
    }
}

#[tokio::test]
async fn a_schema_that_a_newer_binary_migrated_is_accepted() {
    let database = TestDatabase::create().await;
    sqlx::raw_sql(
        "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
         values (9999, 'due dates', true, '\\x00', 0)",
    )
    .execute(&mut database.connect().await)
    .await
    .expect("inserted");
    for migrate_on_start in [true, false] {
        let starting = begin(&database, Config { migrate_on_start, ..config() }).await;
        let channel = connect(starting.address).await;
        eventually("it serves", async || check(&channel, "").await == ServingStatus::Serving).await;
    }
}

async fn stopped(app: &mut App) {
    in_time("the end of the server", &mut app.running).await.expect("it stops");
}

#[tokio::test]
async fn stopping_ends_watches_after_not_serving() {
    let mut app = App::start_with(Config { shutdown_grace_seconds: 60, ..config() }).await;
    let mut watches = watch_readiness(&app).await;
    let mut alive = app.watch(LIVENESS).await;
    let _open = app.wire().await;
    let begun = Instant::now();
    app.stop();
    for watch in &mut watches {
        in_time("NOT_SERVING", watch.until_not_serving()).await;
        in_time("the end of a watch", watch.until_ended()).await;
    }
    in_time("the end of a watch", alive.until_ended()).await;
    stopped(&mut app).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    TcpStream::connect(app.address).await.expect_err("nobody listens");
}

/// An error inside a stream, whose request id came back before it.
#[track_caller]
fn assert_has_details(status: &Status) {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!((info.reason.is_empty(), &*info.domain), (false, "fastzero"), "{status:?}");
    let request = details.request_info().unwrap_or_else(|| panic!("no RequestInfo in {status:?}"));
    assert!(!request.request_id.is_empty());
}

#[tokio::test]
async fn a_watch_that_stopping_ends_has_the_details_of_every_error() {
    let app = App::start().await;
    let mut watch = app.watch("").await;
    app.stop();
    let status = in_time("the end of a watch", watch.until_ended()).await;
    let status = status.expect("it ends with an error");
    assert_eq!(status.code(), Code::Unavailable);
    assert_has_details(&status);
}

#[tokio::test]
async fn a_watch_ends_with_its_deadline() {
    let app = App::start().await;
    let mut request = Request::new(HealthCheckRequest::default());
    request.set_timeout(Duration::from_millis(300));
    let watch = HealthClient::new(app.channel.clone()).watch(request).await.expect("watched");
    let begun = Instant::now();
    let status = in_time("the end of a watch", Watch(watch.into_inner()).until_ended()).await;
    let status = status.expect("it ends with an error");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_has_details(&status);
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn the_grace_is_a_hard_end() {
    let mut app = App::start_with(Config { shutdown_grace_seconds: 1, ..config() }).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("Held").await;
    let mut lock = app.hold("lock todos").await;
    let held = tokio::spawn(async move { ana.try_delete_todo(&todo.id, "").await });
    lock.until_awaited().await;
    let begun = Instant::now();
    app.stop();
    stopped(&mut app).await;
    let took = begun.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(2)).contains(&took), "{took:?}");
    held.await.expect("no panic").expect_err("it was cut");
}

#[tokio::test]
async fn connections_without_a_call_do_not_hold_the_stop() {
    let mut app = App::start_with(Config { shutdown_grace_seconds: 60, ..config() }).await;
    let mut watch = app.watch("").await;
    // It never sends what HTTP/2 begins with.
    let _silent = TcpStream::connect(app.address).await.expect("connected");
    let begun = Instant::now();
    app.stop();
    in_time("the end of a watch", watch.until_ended()).await;
    stopped(&mut app).await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_call_under_way_is_answered_while_the_server_stops() {
    let mut app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("old").await;
    let mut held = app.lock_todo(&todo.id).await;
    let mut watch = app.watch("").await;
    let new = Todo { title: "new".into(), ..todo };
    let update = tokio::spawn(async move { ana.update_todo(new, None).await });
    held.until_awaited().await;
    app.stop();
    in_time("the end of a watch", watch.until_ended()).await;
    assert!(!update.is_finished());
    assert!(!app.running.is_finished());
    held.release().await;
    let updated = in_time("the answer", update).await.expect("answered");
    assert_eq!(updated.title, "new");
    stopped(&mut app).await;
}

async fn try_reflect(wire: &Wire, version: &str, asked: MessageRequest) -> Answer<Vec<u8>> {
    let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
    let request = ServerReflectionRequest { message_request: Some(asked), ..<_>::default() };
    wire.call(&path, &request.encode_to_vec()).await
}

/// The messages of both versions are alike.
async fn reflect(wire: &Wire, version: &str, asked: MessageRequest) -> MessageResponse {
    let answer = try_reflect(wire, version, asked).await.expect("answered").into_inner();
    let response = ServerReflectionResponse::decode(&*answer).expect("a response");
    response.message_response.expect("it says something")
}

/// The names of the files that a file imports.
async fn imports(wire: &Wire, version: &str, asked: MessageRequest) -> Vec<String> {
    let MessageResponse::FileDescriptorResponse(files) = reflect(wire, version, asked).await else {
        panic!("no file descriptor");
    };
    let decode = |file: &Vec<u8>| FileDescriptorProto::decode(&**file).expect("a descriptor");
    files.file_descriptor_proto.iter().flat_map(|file| decode(file).dependency).collect()
}

#[tokio::test]
async fn reflection_lists_every_service_and_describes_it() {
    let app = App::start().await;
    let wire = app.wire().await;
    for version in REFLECTION {
        let listed = reflect(&wire, version, MessageRequest::ListServices(String::new())).await;
        let MessageResponse::ListServicesResponse(listed) = listed else {
            panic!("no list");
        };
        let listed: BTreeSet<_> = listed.service.into_iter().map(|service| service.name).collect();
        let expected = [
            "fastzero.auth.v1.AuthService",
            "fastzero.todo.v1.TodoService",
            "fastzero.user.v1.UserService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        ];
        assert_eq!(listed, expected.map(str::to_owned).into(), "{version}");

        // A client needs the files of all services, and whatever they import.
        let mut files = vec!["fastzero/error/v1/error_reason.proto".to_owned()];
        for service in listed {
            let asked = MessageRequest::FileContainingSymbol(service);
            files.extend(imports(&wire, version, asked).await);
        }
        while let Some(file) = files.pop() {
            let asked = MessageRequest::FileByFilename(file);
            files.extend(imports(&wire, version, asked).await);
        }
    }
}

#[tokio::test]
async fn what_reflection_does_not_know_has_the_details_of_every_error() {
    let app = App::start().await;
    let wire = app.wire().await;
    for version in REFLECTION {
        let asked = MessageRequest::FileContainingSymbol("no.such.Symbol".to_owned());
        let status = try_reflect(&wire, version, asked).await.expect_err("unknown");
        assert_eq!(status.code(), Code::NotFound);
        assert_has_details(&status);
    }
}

#[tokio::test]
async fn reflection_can_be_switched_off() {
    let app = App::start_with(Config { reflection: false, ..config() }).await;
    let wire = app.wire().await;
    for version in REFLECTION {
        let asked = MessageRequest::ListServices(String::new());
        let refused = try_reflect(&wire, version, asked).await.map(without_message);
        assert_refused(refused, Code::Unimplemented, "UNIMPLEMENTED");
    }
    assert_eq!(check(&app.channel, "").await, ServingStatus::Serving);
    app.signed_up("ana").await.create(titled("everything else works")).await;
}
