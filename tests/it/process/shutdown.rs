//! Graceful shutdown.

use std::time::{Duration, Instant};

use fast_zero::proto::todo::v1::Todo;
use tokio::net::TcpStream;

use crate::support::{
    App,
    app::config_with,
    health::{LIVENESS_SERVICE, watch_readiness},
    wait::with_timeout,
};

async fn stopped(app: &mut App) {
    with_timeout("the end of the server", &mut app.server_task).await.expect("a clean stop");
}

#[tokio::test]
async fn a_shutdown_ends_watches_after_not_serving() {
    let mut app = App::start_with(config_with(|config| {
        config.lifecycle.shutdown_grace_seconds = 60;
    }))
    .await;
    let mut watches = watch_readiness(&app).await;
    let mut liveness = app.watch(LIVENESS_SERVICE).await;
    let _open = app.raw_client().await;
    let started = Instant::now();
    app.shut_down();
    for watch in &mut watches {
        with_timeout("NOT_SERVING", watch.wait_until_not_serving()).await;
        with_timeout("the end of a watch", watch.wait_until_ended()).await;
    }
    with_timeout("the end of a watch", liveness.wait_until_ended()).await;
    stopped(&mut app).await;
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    TcpStream::connect(app.address).await.expect_err("the listener is closed");
}

#[tokio::test]
async fn the_grace_period_is_a_hard_limit() {
    let mut app = App::start_with(config_with(|config| {
        config.lifecycle.shutdown_grace_seconds = 1;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("Held").await;
    let mut lock = app.hold_lock("lock todos").await;
    let held = tokio::spawn(async move { ana.try_delete_todo(&todo.id, "").await });
    lock.wait_until_blocking().await;
    let started = Instant::now();
    app.shut_down();
    stopped(&mut app).await;
    let took = started.elapsed();
    assert!((Duration::from_secs(1)..Duration::from_secs(2)).contains(&took), "{took:?}");
    held.await.expect("no panic").expect_err("a truncated message");
}

#[tokio::test]
async fn idle_connections_do_not_delay_the_shutdown() {
    let mut app = App::start_with(config_with(|config| {
        config.lifecycle.shutdown_grace_seconds = 60;
    }))
    .await;
    let mut watch = app.watch("").await;
    // A connection that never sends the HTTP/2 preface.
    let _silent = TcpStream::connect(app.address).await.expect("connected");
    let started = Instant::now();
    app.shut_down();
    with_timeout("the end of a watch", watch.wait_until_ended()).await;
    stopped(&mut app).await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_call_in_flight_completes_during_shutdown() {
    let mut app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("old").await;
    let mut held = app.lock_todo(&todo.id).await;
    let mut watch = app.watch("").await;
    let new = Todo { title: "new".into(), ..todo };
    let update = tokio::spawn(async move { ana.update_todo(new, None).await });
    held.wait_until_blocking().await;
    app.shut_down();
    with_timeout("the end of a watch", watch.wait_until_ended()).await;
    assert!(!update.is_finished());
    assert!(!app.server_task.is_finished());
    held.release().await;
    let updated = with_timeout("the response", update).await.expect("a response");
    assert_eq!(updated.title, "new");
    stopped(&mut app).await;
}
