//! The stack with two replicas behind a load balancer.

use std::time::{Duration, Instant};

use tokio::{task::JoinSet, time::sleep};
use tonic::Code;

use super::{APP, BASE, DATABASE, REPLICAS, docker_logs, timed};
use crate::support::{
    Client,
    assert::assert_status,
    compose::{DATABASE_PASSWORD, Stack, docker, inspect, is_engine_available},
    follower::follow,
    parallel::join_all,
    todos::todo_titled,
    wait::wait_until,
};

/// The maximum time from the recovery of the database to the first successful call: the pause of
/// the pooler, a health check of 2 s, and the check of the load balancer.
const MAX_RECOVERY_TIME: Duration = Duration::from_secs(5);

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn calls_are_balanced_across_two_replicas() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::started(&[BASE, REPLICAS]).await;
    let replicas = stack.containers(APP).await;
    assert_eq!(replicas.len(), 2);
    let ana = stack.anonymous().await.signed_up("ana").await;
    let todo = ana.create_todo("Share").await;

    // Sessions record the address of the client, not that of the load balancer.
    let balancer = stack.containers("fastzero_balancer").await.remove(0);
    let address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = docker(&["inspect", "--format", address, &balancer]).await;
    let sessions = ana.list_sessions().await;
    assert_ne!(sessions[0].peer, address.trim());

    // The connections of the pooler have the limits that the service sets on its own.
    let limits = "select string_agg(setting || unit, ' ' order by name) from pg_settings where name
        in ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout')";
    let url = "postgresql://app_user@127.0.0.1/app_db";
    let password = format!("PGPASSWORD={DATABASE_PASSWORD}");
    let limits = ["exec", "-T", "-e", &password, "fastzero_pgbouncer", "psql", url, "-tAc", limits];
    assert_eq!(stack.compose(&limits).await, "10000ms 5000ms 10000ms\n");

    let reached = async |replica: &str| docker_logs(replica).await.matches("GetTodo").count();
    for _ in 0..40 {
        ana.get_todo(&todo.id).await;
    }
    for replica in &replicas {
        assert!(reached(replica).await > 0, "calls reach both");
    }

    let stopping = tokio::spawn({
        let replica = replicas[0].clone();
        async move { docker(&["stop", &replica]).await }
    });
    let callers = (0..8).map(|_| {
        let (ana, id) = (ana.clone(), todo.id.clone());
        async move {
            for _ in 0..500 {
                get_with_retry(&ana, &id).await;
            }
        }
    });
    join_all(callers).await;
    stopping.await.expect("no panic");
    get_with_retry(&ana, &todo.id).await;

    let before = reached(&replicas[0]).await;
    docker(&["start", &replicas[0]]).await;
    wait_until("the replica serves again", async || {
        get_with_retry(&ana, &todo.id).await;
        sleep(Duration::from_millis(100)).await;
        reached(&replicas[0]).await > before
    })
    .await;
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn open_watches_resume_when_replicas_restart() {
    const WATCHES: usize = 12;
    if !is_engine_available() {
        return;
    }
    let stack = Stack::started(&[BASE, REPLICAS]).await;
    let replicas = stack.containers(APP).await;
    let ana = stack.anonymous().await.signed_up("ana").await;
    ana.create_todo("0").await;
    let mut following = JoinSet::new();
    for _ in 0..WATCHES {
        following.spawn(follow(ana.clone(), "the last todo"));
    }
    // The line of a watch is logged at its end.
    let ended = async |replica: &str| docker_logs(replica).await.matches("WatchTodos").count();
    let mut number = 0;
    for replica in &replicas {
        let before = ended(replica).await;
        let restarting = tokio::spawn({
            let replica = replica.clone();
            async move { docker(&["restart", &replica]).await }
        });
        while !restarting.is_finished() {
            number += 1;
            create_with_retry(&ana, &number.to_string()).await;
            sleep(Duration::from_millis(20)).await;
        }
        restarting.await.expect("no panic");
        assert!(ended(replica).await > before, "watches were open at each replica");
        let pause = Duration::from_millis(200);
        wait_until("the replica is healthy", async || {
            sleep(pause).await;
            inspect(replica, "{{.State.Health.Status}}").await == "healthy"
        })
        .await;
    }
    create_with_retry(&ana, "the last todo").await;
    let todos = ana.list_all_todos(<_>::default()).await;
    let mut resumed = 0;
    for followed in following.join_all().await {
        assert!(followed.copy.todos.into_values().eq(todos.iter().cloned()), "nothing is missed");
        assert_eq!(followed.full_syncs, 1, "a watch resumes at its cursor");
        resumed += followed.ends.len();
    }
    println!("{WATCHES} watches, {resumed} resumed, {} todos", todos.len());
    assert!(resumed >= WATCHES, "{resumed}");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_replica_that_is_not_ready_gets_no_calls() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::started(&[BASE, REPLICAS]).await;
    let ana = stack.anonymous().await.signed_up("ana").await;
    let todo = ana.create_todo("Share").await;
    let balancer = stack.container("fastzero_balancer").await;
    let logged = async |text: &str| {
        wait_until(text, async || docker_logs(&balancer).await.contains(text)).await;
    };

    // A third replica accepts connections and cannot reach the database.
    let url = "DATABASE_URL=postgresql://app_user@127.0.0.1:1/app_db";
    let wait = "DATABASE_WAIT_SECONDS=600";
    let broken =
        ["run", "--detach", "--no-deps", "--use-aliases", "-e", url, "-e", wait, APP, "serve"];
    let broken = stack.compose(&broken).await;
    wait_until("the replica listens", async || {
        docker_logs(broken.trim()).await.contains("\"serving metrics\"")
    })
    .await;
    logged("Server replicas/replica3 is DOWN").await;
    // Longer than a check of its port would take to admit it.
    let until = Instant::now() + Duration::from_secs(3);
    let callers = (0..8).map(|_| {
        let (ana, id) = (ana.clone(), todo.id.clone());
        async move {
            while Instant::now() < until {
                ana.get_todo(&id).await;
            }
        }
    });
    join_all(callers).await;
    assert!(!docker_logs(broken.trim()).await.contains("GetTodo"), "it gets no calls");
    docker(&["rm", "--force", broken.trim()]).await;

    // Without a ready replica, callers receive the reason.
    stack.compose(&["kill", DATABASE]).await;
    logged("backend 'replicas' has no server available").await;
    for _ in 0..10 {
        let rejected = timed(ana.try_get_todo(&todo.id)).await;
        assert_status(rejected, Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
    // The pooler connects again soon after the database is back.
    stack.compose(&["start", DATABASE]).await;
    stack.wait_until_health(DATABASE, "healthy").await;
    let recovered = Instant::now();
    wait_until("a call succeeds", async || timed(ana.try_get_todo(&todo.id)).await.is_ok()).await;
    assert!(recovered.elapsed() < MAX_RECOVERY_TIME, "{:?}", recovered.elapsed());

    // The health check of the pooler causes no errors in its log.
    let pooler = stack.container("fastzero_pgbouncer").await;
    let log = docker_logs(&pooler).await;
    assert!(!log.contains("no such user") && !log.contains("no such database"), "{log}");
}

/// Creates a todo, with one retry as a client should do after UNAVAILABLE.
async fn create_with_retry(client: &Client, title: &str) {
    let create = || client.try_create_todo(Some(todo_titled(title)));
    let response = match create().await {
        Err(status) if status.code() == Code::Unavailable => create().await,
        response => response,
    };
    response.expect("one retry is enough");
}

/// Gets a todo, with one retry as a client should do after UNAVAILABLE.
async fn get_with_retry(client: &Client, id: &str) {
    let response = match client.try_get_todo(id).await {
        Err(status) if status.code() == Code::Unavailable => client.try_get_todo(id).await,
        response => response,
    };
    response.expect("one retry is enough");
}
