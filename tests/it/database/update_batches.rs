//! Batches of updates: of several owners, of clocks that are held, and of the same todos.

use std::{collections::BTreeSet, time::Duration};

use fast_zero::proto::todo::v1::Todo;
use tokio::{task::JoinHandle, time::timeout};

use crate::support::{
    App, Client, app::unique_name, metrics::config_with_metrics, parallel::join_all,
    statements::statement_count, todos::todo_titled,
};

/// Blocks all statements on todos.
const LOCK: &str = "lock table todos in access exclusive mode";

/// Starts an update, and returns its request ID, too.
fn update(owner: &Client, todo: &Todo, title: &str) -> (JoinHandle<Todo>, String) {
    let request_id = unique_name("update-");
    let owner = owner.clone().with_metadata("x-request-id", &request_id);
    let new = Todo { id: todo.id.clone(), ..todo_titled(title) };
    let call = tokio::spawn(async move { owner.update_todo(new, Some(&["title"])).await });
    (call, request_id)
}

fn statements(request_ids: &[String]) -> usize {
    request_ids.iter().map(|request_id| statement_count(request_id)).sum()
}

/// Starts a server with owners that have a todo each.
async fn start(owners: usize) -> (App, Vec<(Client, Todo)>) {
    let app = App::start_with(config_with_metrics()).await;
    let mut clients = Vec::new();
    for number in 0..owners {
        let owner = app.signed_up(&format!("owner{number}")).await;
        let todo = owner.create_todo("old").await;
        clients.push((owner, todo));
    }
    (app, clients)
}

#[tokio::test]
async fn updates_of_several_owners_share_a_statement() {
    let (app, owners) = start(16).await;
    let lock = app.hold_lock(LOCK).await;
    let calls = owners.iter().map(|(owner, todo)| update(owner, todo, &todo.id));
    let (calls, request_ids): (Vec<_>, Vec<_>) = calls.unzip();
    app.wait_until_in_flight(16).await;
    lock.release().await;
    for (call, (owner, todo)) in calls.into_iter().zip(&owners) {
        let updated = call.await.expect("no panic");
        assert_eq!(updated.title, todo.id);
        assert_eq!(owner.get_todo(&todo.id).await, updated);
    }
    let statements = statements(&request_ids);
    // Those that arrive first run alone.
    assert!(statements <= 8, "{statements} statements for 16 updates");
}

#[tokio::test]
async fn updates_of_free_clocks_do_not_wait_for_held_ones_in_their_batch() {
    let (app, owners) = start(8).await;
    let table = app.hold_lock(LOCK).await;
    let start = |(owner, todo): &(Client, Todo)| update(owner, todo, "new").0;
    let mut calls: Vec<_> = owners.iter().map(start).collect();
    app.wait_until_in_flight(8).await;
    let mut clock = app
        .hold_lock(
            "select from todo_clocks where owner_id in (
                select id from users where username in ('owner6', 'owner7')
            ) for update",
        )
        .await;
    table.release().await;
    let held = calls.split_off(6);
    for call in calls {
        timeout(Duration::from_secs(4), call).await.expect("in time").expect("no panic");
    }
    clock.wait_until_blocked_by(2).await;
    assert!(held.iter().all(|call| !call.is_finished()));
    clock.release().await;
    for call in held {
        assert_eq!(call.await.expect("no panic").title, "new");
    }
}

#[tokio::test]
async fn updates_of_the_same_todos_are_batched() {
    let (app, owners) = start(1).await;
    let owner = &owners[0].0;
    let mut todos = Vec::new();
    for _ in 0..8 {
        todos.push(owner.create_todo("old").await);
    }
    let mut lock = app.hold_lock("select from todo_clocks for update").await;
    let calls = (0..4).flat_map(|_| &todos).map(|todo| update(owner, todo, "new"));
    let (calls, request_ids): (Vec<_>, Vec<_>) = calls.unzip();
    app.wait_until_in_flight(32).await;
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    let etags: BTreeSet<_> =
        join_all(calls).await.into_iter().map(|it| it.expect("no panic").etag).collect();
    assert_eq!(etags.len(), 32);
    let statements = statements(&request_ids);
    // Four with an update of each todo, and those that arrive first.
    assert!(statements <= 12, "{statements} statements for 32 updates");
}
