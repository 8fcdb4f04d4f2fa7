//! The limits of calls in flight.

use std::time::{Duration, Instant};

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use tokio::task::JoinSet;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use super::{GET, assert_overloaded};
use crate::support::{
    App,
    app::{adjusted, config_with},
    assert::assert_status,
    http2::{OTHER_CLIENT_IP, length_prefixed},
    metrics::config_with_metrics as config,
    raw_client::{RawClient, full_body, read_rpc_result, unfinished_body},
    wait::with_timeout,
};

#[tokio::test]
async fn calls_beyond_the_limit_are_shed_but_health_calls_are_not() {
    let app = App::start_with(config_with(|config| {
        config.limits.max_concurrent_calls = 2;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut lock = app.lock_todo(&todo.id).await;
    let update = || {
        let (ana, todo) = (ana.clone(), Todo { etag: String::new(), ..todo.clone() });
        tokio::spawn(async move { ana.try_update_todo(Some(todo), Some(&["title"])).await })
    };
    let held = [update(), update()];
    lock.wait_until_blocked_by(2).await;

    let started = Instant::now();
    let rejected = ana.try_list_todos(ListTodosRequest::default()).await;
    let rejected = assert_status(rejected, Code::ResourceExhausted, "OVERLOADED");
    assert!(rejected.get_error_details().retry_info().is_some(), "{rejected:?}");
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    let mut health = HealthClient::new(app.channel.clone());
    health.check(HealthCheckRequest::default()).await.expect("a health response");

    lock.release().await;
    for held in held {
        held.await.expect("no panic").expect("an admitted call succeeds");
    }
    ana.try_list_todos(ListTodosRequest::default()).await.expect("a permit is free");
}

#[tokio::test]
async fn calls_without_a_body_hold_no_permit() {
    let app = App::start_with(adjusted(config(), |config| {
        config.limits.max_concurrent_calls = 2;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let raw = app.raw_client().await.with_token_of(&ana).with_metadata("grpc-timeout", "4S");
    let mut silent = JoinSet::new();
    for _ in 0..50 {
        let mut raw = raw.clone();
        silent.spawn(async move { raw.send(GET, unfinished_body("")).await });
    }
    let in_flight = async || app.scrape().await.get("fastzero_calls_in_flight");
    app.wait_until_in_flight(50).await;
    ana.get_todo(&todo.id).await;
    assert_eq!(in_flight().await, Some(50.0), "they wait for their bodies");
    while let Some(ended) = with_timeout("the deadline", silent.join_next()).await {
        let ended = read_rpc_result(ended.expect("no panic").expect("a response")).await;
        assert_status(ended, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    }
}

#[tokio::test]
async fn health_calls_are_limited_per_client() {
    let app = App::start_with(config()).await;
    let mut watching = Vec::new();
    let rejected = 'rejected: loop {
        let mut raw =
            RawClient::connect_from(OTHER_CLIENT_IP, app.address, None).await.expect("connected");
        for _ in 0..100 {
            let watch =
                raw.send("/grpc.health.v1.Health/Watch", full_body(length_prefixed(b""))).await;
            let watch = watch.expect("a response");
            if watch.headers().contains_key("grpc-status") {
                break 'rejected read_rpc_result(watch).await;
            }
            watching.push((raw.clone(), watch));
        }
    };
    assert_overloaded(rejected);
    assert_eq!(watching.len(), 256);
    let mut health = HealthClient::new(app.channel.clone());
    health.check(HealthCheckRequest::default()).await.expect("a health call of another client");
}
