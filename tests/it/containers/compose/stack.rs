//! The base stack: database outages, stops, volumes and migrations.

use std::time::{Duration, Instant};

use fast_zero::proto::todo::v1::ListTodosRequest;
use tonic::Code;

use super::{APP, BASE, DATABASE, docker_logs, login, timed};
use crate::support::{
    PASSWORD,
    assert::assert_status,
    compose::{Stack, docker, inspect, is_engine_available},
    parallel::join_all,
    row_lock::RowLock,
    todos::{discard_message, todo_titled},
    wait::wait_until,
};

/// The maximum time until an outage is visible from outside.
const MAX_OUTAGE_DELAY: Duration = Duration::from_secs(15);

/// The maximum time of a stop: the grace period of 8 s, plus 2 s.
const MAX_STOP_TIME: Duration = Duration::from_secs(10);

/// The maximum memory of an idle service.
const MAX_IDLE_MEMORY_MIB: f64 = 32.0;

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_database_outage_is_reported_and_survived() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::started(&[BASE]).await;
    let container = stack.container(APP).await;
    assert_eq!(inspect(&container, "{{.State.Health.Status}}").await, "healthy");
    let probe = "/bin/grpc_health_probe";
    assert!(inspect(&container, "{{.Config.Healthcheck.Test}}").await.contains(probe));
    docker(&["exec", &container, probe, "-addr=127.0.0.1:50051"]).await;
    docker(&["exec", &container, "/bin/fast-zero", "healthcheck"]).await;

    let ana = stack.anonymous().await.signed_up("ana").await;
    let todo = ana.create_todo("Stay").await;
    let started = Instant::now();
    stack.compose(&["kill", DATABASE]).await;
    let rejected = [
        timed(ana.try_get_todo(&todo.id)).await.map(discard_message),
        timed(ana.try_list_todos(ListTodosRequest::default())).await.map(discard_message),
        timed(ana.try_create_todo(Some(todo_titled("Lost")))).await.map(discard_message),
        timed(ana.auth().login(login("ana"))).await.map(discard_message),
    ];
    for rejected in rejected {
        assert_status(rejected, Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
    stack.wait_until_health(APP, "unhealthy").await;
    assert!(started.elapsed() < MAX_OUTAGE_DELAY, "{:?}", started.elapsed());

    stack.compose(&["start", DATABASE]).await;
    stack.wait_until_health(APP, "healthy").await;
    assert_eq!(ana.get_todo(&todo.id).await, todo);
    assert_eq!(inspect(&container, "{{.RestartCount}}").await, "0");

    let usage = docker(&["stats", "--no-stream", "--format", "{{.MemUsage}}", &container]).await;
    let used = usage.split("MiB").next().and_then(|used| used.parse::<f64>().ok());
    assert!(used.is_some_and(|used| used < MAX_IDLE_MEMORY_MIB), "{usage}");
}

/// Eight hashes take 152 MiB.
#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn hashing_threads_fit_the_memory_of_the_container() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::configured(&[BASE, "memory.yaml"]);
    let small = format!(
        "services: {{{APP}: {{environment: {{HASHING_THREADS: 8}}, \
         deploy: {{resources: {{limits: {{memory: 64M}}}}}}}}}}"
    );
    std::fs::write(stack.path("memory.yaml"), small).expect("written");
    stack.compose(&["up", "--build", "--wait"]).await;
    let client = stack.anonymous().await;
    // The queue of one thread has 17 slots.
    let users = (0..16).map(|number| {
        let client = client.clone();
        async move { client.create_user(&format!("user{number}")).await }
    });
    join_all(users).await;
    let container = stack.container(APP).await;
    assert_eq!(inspect(&container, "{{.State.OOMKilled}} {{.RestartCount}}").await, "false 0");
    let log = docker_logs(&container).await;
    assert!(log.contains("too many hashing threads for the memory"), "{log}");
    assert!(log.contains("\"threads\":1"), "{log}");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_stop_drains_calls_in_flight() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::started(&[BASE]).await;
    let ana = stack.anonymous().await.signed_up("ana").await;
    let todo = ana.create_todo("Wait").await;
    let mut lock = RowLock::acquire(stack.connect_database().await, "lock todos").await;
    let deleting = tokio::spawn({
        let (ana, id) = (ana.clone(), todo.id.clone());
        async move { ana.try_delete_todo(&id, "").await }
    });
    lock.wait_until_blocking().await;

    let container = stack.container(APP).await;
    let started = Instant::now();
    let stopping = tokio::spawn({
        let container = container.clone();
        async move { docker(&["stop", &container]).await }
    });
    wait_until("the server stops", async || {
        docker_logs(&container).await.contains("\"shutting down\"")
    })
    .await;
    lock.release().await;
    deleting.await.expect("no panic").expect("a call in flight completes");
    stopping.await.expect("no panic");
    assert!(started.elapsed() < MAX_STOP_TIME, "{:?}", started.elapsed());
    assert_eq!(inspect(&container, "{{.State.ExitCode}}").await, "0");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_data_lives_as_long_as_its_volume() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::started(&[BASE]).await;
    stack.anonymous().await.create_user("ana").await;
    stack.compose(&["down"]).await;
    stack.compose(&["up", "--wait"]).await;
    stack.anonymous().await.logged_in("ana", PASSWORD).await.expect("ana still exists");
    stack.compose(&["down", "--volumes"]).await;
    stack.compose(&["up", "--wait"]).await;
    let rejected = stack.anonymous().await.auth().login(login("ana")).await;
    assert_status(rejected, Code::Unauthenticated, "INCORRECT_CREDENTIALS");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn concurrently_started_replicas_migrate_once() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    stack.compose(&["build"]).await;
    stack.compose(&["up", "--wait", DATABASE]).await;
    let run = ["run", "--detach", "--no-deps", APP];
    let (one, other) = tokio::join!(stack.compose(&run), stack.compose(&run));
    for replica in [one.trim(), other.trim()] {
        wait_until("the server serves", async || {
            assert_eq!(inspect(replica, "{{.State.Running}}").await, "true");
            docker_logs(replica).await.contains("\"serving\"")
        })
        .await;
    }
    let applied = sqlx::query_scalar("select count(*) from _sqlx_migrations where success");
    let applied: i64 =
        applied.fetch_one(&mut stack.connect_database().await).await.expect("counted");
    assert_eq!(usize::try_from(applied), Ok(crate::support::postgres::MIGRATIONS.iter().count()));
}
