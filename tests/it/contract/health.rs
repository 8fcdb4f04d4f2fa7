//! The gRPC health service.

use std::time::{Duration, Instant};

use tonic::{Code, Request};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::support::{
    App,
    assert::{assert_has_error_details, assert_status},
    health::{
        LIVENESS_SERVICE, READINESS_SERVICES, Watch, check_health, try_check_health,
        watch_readiness,
    },
    wait::{wait_until, with_timeout},
};

#[tokio::test]
async fn every_service_is_serving() {
    let app = App::start().await;
    for service in READINESS_SERVICES.into_iter().chain([LIVENESS_SERVICE]) {
        assert_eq!(check_health(&app.channel, service).await, ServingStatus::Serving, "{service}");
        with_timeout("SERVING", app.watch(service).await.wait_until_serving()).await;
    }
}

#[tokio::test]
async fn an_unknown_service_is_not_found_and_a_watch_of_it_stays_open() {
    let app = App::start().await;
    for service in ["no.such.Service", "TodoService", "fastzero.todo.v1", "Liveness", " "] {
        let rejected = try_check_health(&app.channel, service).await;
        assert_status(rejected, Code::NotFound, "SERVICE_UNKNOWN");
        let mut request = Request::new(HealthCheckRequest { service: service.to_owned() });
        request.set_timeout(Duration::from_millis(300));
        let watch = HealthClient::new(app.channel.clone()).watch(request).await;
        let mut watch = watch.expect("watched").into_inner();
        let first = watch.message().await.expect("a message").expect("a message");
        assert_eq!(first.status(), ServingStatus::ServiceUnknown, "{service}");
        let end = with_timeout("the deadline", watch.message()).await.expect_err("no message");
        assert_eq!(end.code(), Code::DeadlineExceeded, "{service}");
    }
}

#[tokio::test]
async fn readiness_follows_the_schema_and_liveness_does_not() {
    let app = App::start().await;
    let mut watches = watch_readiness(&app).await;
    app.execute(
        "create table saved as table _sqlx_migrations;
         delete from _sqlx_migrations where version = (select max(version) from saved)",
    )
    .await;
    for watch in &mut watches {
        with_timeout("NOT_SERVING", watch.wait_until_not_serving()).await;
    }
    assert_eq!(check_health(&app.channel, "").await, ServingStatus::NotServing);
    assert_eq!(check_health(&app.channel, LIVENESS_SERVICE).await, ServingStatus::Serving);
    app.execute(
        "insert into _sqlx_migrations
         select * from saved where version = (select max(version) from saved)",
    )
    .await;
    for watch in &mut watches {
        with_timeout("SERVING", watch.wait_until_serving()).await;
    }
    assert_eq!(check_health(&app.channel, LIVENESS_SERVICE).await, ServingStatus::Serving);
}

/// Returns the process ID of the PostgreSQL backend that serves the health checks. The startup runs
/// the same statement, but on a connection of the pool, and so only once.
async fn health_check_backend(app: &App) -> Option<i32> {
    app.fetch_scalar(
        "select max(pid) from pg_stat_activity where datname = current_database()
            and application_name = 'fast-zero' and query like '%from _sqlx_migrations%'
            and query_start > backend_start + interval '400 ms'",
    )
    .await
}

#[tokio::test]
async fn a_closed_database_connection_is_no_outage() {
    let app = App::start().await;
    let mut watch = app.watch("").await;
    with_timeout("SERVING", watch.wait_until_serving()).await;
    wait_until("a health check", async || health_check_backend(&app).await.is_some()).await;
    let before = health_check_backend(&app).await;
    app.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and application_name = 'fast-zero'",
    )
    .await;
    let next_check = wait_until("another health check", async || {
        let now = health_check_backend(&app).await;
        now.is_some() && now != before
    });
    tokio::select! {
        () = watch.wait_until_not_serving() => panic!("the database is available"),
        () = next_check => {}
    }
    // The health check discarded the closed connections of the pool, too.
    app.create_user("ana").await;
}

#[tokio::test]
async fn a_watch_ended_by_shutdown_has_the_details_of_every_error() {
    let app = App::start().await;
    let mut watch = app.watch("").await;
    app.shut_down();
    let status = with_timeout("the end of a watch", watch.wait_until_ended()).await;
    let status = status.expect("an error at the end");
    assert_eq!(status.code(), Code::Unavailable);
    assert_has_error_details(&status);
}

#[tokio::test]
async fn a_watch_ends_with_its_deadline() {
    let app = App::start().await;
    let mut request = Request::new(HealthCheckRequest::default());
    request.set_timeout(Duration::from_millis(300));
    let watch = HealthClient::new(app.channel.clone()).watch(request).await.expect("watched");
    let started = Instant::now();
    let status =
        with_timeout("the end of a watch", Watch(watch.into_inner()).wait_until_ended()).await;
    let status = status.expect("an error at the end");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_has_error_details(&status);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}
