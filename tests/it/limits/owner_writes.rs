//! Concurrent writes to the todos of one owner.

use std::time::Duration;

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use tokio::{task::JoinHandle, time::timeout};
use tonic::{Code, Response, Status};

use crate::support::{
    App, Client,
    app::adjusted,
    assert::assert_unauthenticated,
    metrics::config_with_metrics,
    parallel::join_all,
    todos::{discard_message, todo_titled},
};

/// Holds the clock of ana.
const CLOCK: &str = "select from todo_clocks where owner_id = (
        select id from users where username = 'ana'
    ) for update";

type Call = JoinHandle<Result<Response<()>, Status>>;

/// Starts a write with each todo: updates, deletions and creations.
fn start_writes(ana: &Client, todos: &[Todo]) -> Vec<Call> {
    let write = |(number, todo): (usize, &Todo)| {
        let (ana, todo) = (ana.clone(), todo.clone());
        tokio::spawn(async move {
            match number % 4 {
                0 => ana.try_update_todo(Some(todo), None).await.map(discard_message),
                1 => ana.try_delete_todo(&todo.id, "").await.map(discard_message),
                _ => ana.try_create_todo(Some(todo_titled("new"))).await.map(discard_message),
            }
        })
    };
    todos.iter().enumerate().map(write).collect()
}

async fn start(coalescing: bool) -> App {
    let config = adjusted(config_with_metrics(), |config| config.limits.coalescing = coalescing);
    App::start_with(config).await
}

#[tokio::test]
async fn writes_of_one_owner_wait_without_a_connection() {
    for coalescing in [true, false] {
        let app = start(coalescing).await;
        let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
        let mut todos = Vec::new();
        for _ in 0..16 {
            todos.push(ana.create_todo("a").await);
        }
        let of_bob = bob.create_todo("b").await;
        let mut lock = app.hold_lock(CLOCK).await;
        let writes = start_writes(&ana, &todos);
        // More than the connections of the pool. Fails if three wait.
        app.wait_until_in_flight(16).await;
        lock.wait_until_blocked_by(2).await;
        let late = ana.clone().with_metadata("grpc-timeout", "100m");
        for late in start_writes(&late, &todos[..4]) {
            let rejected = late.await.expect("no panic").expect_err("the deadline expires");
            // The client's own timer may be first.
            let codes = [Code::DeadlineExceeded, Code::Cancelled];
            assert!(codes.contains(&rejected.code()), "{rejected:?}");
        }
        // The others have connections, and ana can read.
        bob.update_todo(of_bob.clone(), None).await;
        bob.create_todo("c").await;
        bob.delete_todo(&of_bob.id).await;
        assert_eq!(ana.list_todos(ListTodosRequest::default()).await.todos, todos);
        lock.wait_until_blocked_by(2).await;
        lock.release().await;
        for write in writes {
            write.await.expect("no panic").expect("written");
        }
        assert_eq!(ana.list_all_todos(ListTodosRequest::default()).await.len(), 16 - 4 + 8);
    }
}

#[tokio::test]
async fn a_write_that_waits_for_a_clock_delays_no_other_owner() {
    let app = start(true).await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    ana.create_todo("a").await;
    let mut lock = app.hold_lock(CLOCK).await;
    let create = |client: &Client| {
        let client = client.clone();
        tokio::spawn(async move { client.create_todo("b").await })
    };
    let waiting: Vec<_> = (0..8).map(|_| create(&ana)).collect();
    lock.wait_until_blocked_by(2).await;
    // As many batches as can run at once, and more.
    for created in (0..8).map(|_| create(&bob)).collect::<Vec<_>>() {
        timeout(Duration::from_secs(4), created).await.expect("in time").expect("no panic");
    }
    assert!(waiting.iter().all(|call| !call.is_finished()));
    lock.release().await;
    for created in waiting {
        created.await.expect("no panic");
    }
}

#[tokio::test]
async fn writes_that_wait_for_the_deletion_of_their_owner_are_unauthenticated() {
    let app = start(true).await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let mut lock = app.hold_lock("delete from users where username = 'ana'").await;
    let create = || {
        let ana = ana.clone();
        tokio::spawn(async move { ana.try_create_todo(Some(todo_titled("b"))).await })
    };
    let calls: Vec<_> = (0..8).map(|_| create()).collect();
    app.wait_until_in_flight(8).await;
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    for call in calls {
        assert_unauthenticated(call.await.expect("no panic"), "SESSION_REVOKED");
    }
}

#[tokio::test]
async fn writes_that_wait_for_clocks_leave_connections_to_other_owners() {
    let app = start(true).await;
    let eve = app.signed_up("eve").await;
    let todo = eve.create_todo("e").await;
    let mut writes = Vec::new();
    for name in ["ana", "bob", "cid", "dot"] {
        let owner = app.signed_up(name).await;
        let todos = [owner.create_todo("a").await, owner.create_todo("b").await];
        writes.push((owner, todos));
    }
    let clocks = "select from todo_clocks where owner_id <> (
            select id from users where username = 'eve'
        ) for update";
    let mut lock = app.hold_lock(clocks).await;
    // An update and a deletion of each owner.
    let writes: Vec<_> =
        writes.iter().flat_map(|(owner, todos)| start_writes(owner, todos)).collect();
    app.wait_until_in_flight(8).await;
    // Three of four connections.
    lock.wait_until_blocked_by(3).await;
    let calls = async {
        assert_eq!(eve.get_todo(&todo.id).await, todo);
        eve.create_todo("f").await;
        eve.update_todo(todo.clone(), None).await;
        // Those that meet another write of eve queue for her.
        let create = || {
            let eve = eve.clone();
            async move { eve.create_todo("g").await }
        };
        join_all((0..16).map(|_| create()).collect::<Vec<_>>()).await;
    };
    timeout(Duration::from_secs(2), calls).await.expect("others do not wait");
    lock.wait_until_blocked_by(3).await;
    lock.release().await;
    for write in writes {
        write.await.expect("no panic").expect("written");
    }
}

/// The statement of a dropped call may still wait in the database.
#[tokio::test]
async fn a_cancelled_write_holds_its_permit_until_its_statement_ends() {
    for kind in ["update", "delete", "undelete", "purge"] {
        let app = start(true).await;
        let ana = app.signed_up("ana").await;
        let mut todos = Vec::new();
        for _ in 0..4 {
            todos.push(ana.create_todo("a").await);
        }
        if kind == "undelete" {
            for todo in &todos {
                ana.delete_todo(&todo.id).await;
            }
        }
        let mut lock = app.hold_lock(CLOCK).await;
        for _ in 0..3 {
            let calls = todos.iter().map(|todo| {
                let ana = ana.clone().with_metadata("grpc-timeout", "400m");
                let todo = todo.clone();
                async move {
                    match kind {
                        "update" => ana.try_update_todo(Some(todo), None).await.map(drop),
                        "delete" => ana.try_delete_todo(&todo.id, "").await.map(drop),
                        "undelete" => ana.try_undelete_todo(&todo.id).await.map(drop),
                        _ => ana.try_purge_todo(&todo.id, "").await.map(drop),
                    }
                }
            });
            let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
            lock.wait_until_blocked_by(2).await;
            for result in calls.await.expect("no panic") {
                result.expect_err("the deadline expires");
            }
            lock.wait_until_blocked_by(2).await;
        }
        lock.release().await;
        ana.create_todo("b").await;
    }
}
