//! The stack with two replicas behind a load balancer.

use std::time::Duration;

use tokio::time::sleep;
use tonic::Code;

use super::{APP, BASE, REPLICAS, docker_logs};
use crate::support::{
    Client,
    compose::{DATABASE_PASSWORD, Stack, docker, is_engine_available},
    parallel::join_all,
    wait::wait_until,
};

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

/// Gets a todo, with one retry as a client should do after UNAVAILABLE.
async fn get_with_retry(client: &Client, id: &str) {
    let response = match client.try_get_todo(id).await {
        Err(status) if status.code() == Code::Unavailable => client.try_get_todo(id).await,
        response => response,
    };
    response.expect("one retry is enough");
}
