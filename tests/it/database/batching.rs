//! Batches of queries.

use std::collections::BTreeSet;

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use tonic::Code;

use crate::support::{
    App, Client,
    app::{adjusted, unique_name},
    assert::assert_status,
    metrics::config_with_metrics,
    parallel::join_all,
    row_lock::RowLock,
    statements::statement_count,
    todos::todo_titled,
};

/// Blocks all statements on todos.
const LOCK: &str = "lock table todos in access exclusive mode";

/// The maximum number of concurrent batches of one query.
const MAX_CONCURRENT_BATCHES: i64 = 2;

impl App {
    /// Occupies all permits with calls that wait for the lock, so that further calls queue.
    async fn occupy_permits(&self, lock: &mut RowLock, ana: &Client) -> Vec<Call> {
        let mut calls = Vec::new();
        for statements in 1..=MAX_CONCURRENT_BATCHES {
            calls.push(create(ana.clone(), "the first"));
            lock.wait_until_blocked_by(statements).await;
        }
        calls
    }
}

type Call = tokio::task::JoinHandle<Result<(), tonic::Status>>;

fn create(caller: Client, title: &'static str) -> Call {
    tokio::spawn(async move { caller.try_create_todo(Some(todo_titled(title))).await.map(drop) })
}

#[tokio::test]
async fn concurrent_calls_are_batched_and_each_gets_its_own_response() {
    for coalescing in [true, false] {
        let app = App::start_with(adjusted(config_with_metrics(), |config| {
            config.limits.coalescing = coalescing;
        }))
        .await;
        let owners = [app.signed_up("ana").await, app.signed_up("bob").await];
        let mut wanted = Vec::new();
        for number in 0..16 {
            wanted.push(owners[number % 2].create_todo(&number.to_string()).await);
        }
        let lock = app.hold_lock(LOCK).await;
        let request_ids: Vec<_> = (0..64).map(|_| unique_name("coalesced-")).collect();
        let calls = request_ids.iter().enumerate().map(|(call, request_id)| {
            // The owner requests each todo twice, and another user twice.
            let (number, caller) = (call % 16, call / 16 % 2);
            let client = owners[caller].clone().with_metadata("x-request-id", request_id);
            let todo = (caller == number % 2).then(|| wanted[number].clone());
            let id = wanted[number].id.clone();
            async move { (client.try_get_todo(&id).await, todo) }
        });
        let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
        app.wait_until_in_flight(64).await;
        lock.release().await;
        for (response, todo) in calls.await.expect("no panic") {
            match todo {
                Some(todo) => assert_eq!(response.expect("found").into_inner().todo, Some(todo)),
                None => drop(assert_status(response, Code::NotFound, "TODO_NOT_FOUND")),
            }
        }
        let statements: usize =
            request_ids.iter().map(|request_id| statement_count(request_id)).sum();
        if coalescing {
            // Two calls run alone, and the others are too many for one batch.
            assert!((4..=8).contains(&statements), "{statements} statements for 64 calls");
        } else {
            assert_eq!(statements, 64);
        }
    }
}

#[tokio::test]
async fn concurrent_lists_are_batched_and_each_gets_its_own_page() {
    let app = App::start_with(config_with_metrics()).await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (cid, dot) = (app.signed_up("cid").await, app.signed_up("dot").await);
    for number in 0..7 {
        ana.create_todo(&number.to_string()).await;
        bob.create_todo("of bob").await;
    }
    // More than the maximum size of a response.
    for _ in 0..30 {
        dot.create_todo_with(Todo {
            description: "\u{10348}".repeat(10_000),
            ..todo_titled("long")
        })
        .await;
    }
    let page = |page_size| ListTodosRequest { page_size, ..ListTodosRequest::default() };
    let mut requests = Vec::new();
    for (caller, size) in
        [(&ana, 1), (&ana, 6), (&ana, 7), (&bob, 3), (&bob, 100), (&cid, 10), (&dot, 100)]
    {
        // Sequential calls are not batched.
        let alone = caller.list_todos(page(size)).await;
        if !alone.next_page_token.is_empty() {
            let next = ListTodosRequest { page_token: alone.next_page_token.clone(), ..page(size) };
            let wanted = caller.list_todos(next.clone()).await;
            requests.push((caller.clone(), next, wanted));
        }
        requests.push((caller.clone(), page(size), alone));
    }
    assert_eq!(requests.len(), 11, "four lists have a next page");
    let lock = app.hold_lock(LOCK).await;
    let request_ids: Vec<_> = requests.iter().map(|_| unique_name("coalesced-")).collect();
    let calls = requests.into_iter().zip(&request_ids).map(|((caller, request, wanted), id)| {
        let caller = caller.with_metadata("x-request-id", id);
        async move { (caller.try_list_todos(request).await, wanted) }
    });
    let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
    app.wait_until_in_flight(11).await;
    lock.release().await;
    for (response, wanted) in calls.await.expect("no panic") {
        assert_eq!(response.expect("listed").into_inner(), wanted);
    }
    let statements: usize = request_ids.iter().map(|request_id| statement_count(request_id)).sum();
    assert!(statements <= 4, "{statements} statements for 11 calls");
}

#[tokio::test]
async fn pages_of_more_than_a_hundred_todos_share_no_statement() {
    let app = App::start_with(config_with_metrics()).await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let lock = app.hold_lock(LOCK).await;
    let request_ids: Vec<_> = (0..8).map(|_| unique_name("coalesced-")).collect();
    let calls = request_ids.iter().map(|id| {
        let ana = ana.clone().with_metadata("x-request-id", id);
        let request = ListTodosRequest { page_size: 101, ..ListTodosRequest::default() };
        async move { ana.try_list_todos(request).await }
    });
    let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
    app.wait_until_in_flight(8).await;
    lock.release().await;
    for listed in calls.await.expect("no panic") {
        listed.expect("listed");
    }
    let statements: usize = request_ids.iter().map(|request_id| statement_count(request_id)).sum();
    assert!(statements >= 8, "{statements} statements for 8 calls");
}

#[tokio::test]
async fn an_insert_for_a_deleted_owner_fails_alone() {
    let app = App::start_with(config_with_metrics()).await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    // The session is cached as active, and the service does not notice the deletion.
    bob.create_todo("the last one").await;
    app.execute("delete from users where username = 'bob'").await;
    let mut lock = app.hold_lock(LOCK).await;
    let first = app.occupy_permits(&mut lock, &ana).await;
    let of_ana: Vec<_> = (0..4).map(|_| create(ana.clone(), "one more")).collect();
    let of_bob = create(bob, "too late");
    app.wait_until_in_flight(7).await;
    lock.release().await;
    for added in first.into_iter().chain(of_ana) {
        added.await.expect("no panic").expect("added");
    }
    let rejected = of_bob.await.expect("no panic").map(tonic::Response::new);
    assert_status(rejected, Code::Unauthenticated, "SESSION_REVOKED");
    assert_eq!(ana.list_all_todos(ListTodosRequest::default()).await.len(), 6);
}

#[tokio::test]
async fn the_deletion_of_an_owner_does_not_block_inserts_of_others() {
    let app = App::start_with(config_with_metrics()).await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let mut lock = app.hold_lock(LOCK).await;
    let first = app.occupy_permits(&mut lock, &ana).await;
    let of_bob = [create(bob.clone(), "one"), create(bob.clone(), "two")];
    let of_ana = [create(ana.clone(), "one more"), create(ana.clone(), "another")];
    app.wait_until_in_flight(6).await;
    let deletion = app.hold_lock("select from users where username = 'bob' for update").await;
    lock.release().await;
    for added in first.into_iter().chain(of_ana) {
        added.await.expect("no panic").expect("added");
    }
    ana.create_todo("and later, too").await;
    assert!(of_bob.iter().all(|call| !call.is_finished()), "the inserts wait for the deletion");
    deletion.release().await;
    for added in of_bob {
        added.await.expect("no panic").expect("added: the deletion was rolled back");
    }
    assert_eq!(bob.list_all_todos(ListTodosRequest::default()).await.len(), 2);
}

/// Writes that wait for the same clock share a statement, too.
#[tokio::test]
async fn inserts_of_one_owner_are_batched_and_each_gets_its_own_version() {
    let app = App::start_with(config_with_metrics()).await;
    let ana = app.signed_up("ana").await;
    for lock in ["select from users for update", "select from todo_clocks for update"] {
        let mut lock = app.hold_lock(lock).await;
        let request_ids: Vec<_> = (0..48).map(|_| unique_name("one-owner-")).collect();
        let calls = request_ids.iter().enumerate().map(|(number, request_id)| {
            let ana = ana.clone();
            let creator = ana.clone().with_metadata("x-request-id", request_id);
            async move {
                let todo = creator.create_todo(&number.to_string()).await;
                assert_eq!(todo.title, number.to_string());
                assert_eq!(ana.get_todo(&todo.id).await, todo);
                todo.etag
            }
        });
        let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
        app.wait_until_in_flight(48).await;
        // Before its first todo, the owner has no clock, and the second write waits for it.
        lock.wait_until_blocked_by(2).await;
        lock.release().await;
        let etags: BTreeSet<_> = calls.await.expect("no panic").into_iter().collect();
        assert_eq!(etags.len(), 48);
        let statements: usize = request_ids.iter().map(|id| statement_count(id)).sum();
        assert!(statements <= 24, "{statements} statements for 48 inserts");
    }
}

#[tokio::test]
async fn concurrent_updates_are_batched_and_each_gets_its_own_result() {
    for lock in [LOCK, "select from todo_clocks for update"] {
        let app = App::start_with(config_with_metrics()).await;
        let owners = [app.signed_up("ana").await, app.signed_up("bob").await];
        let mut todos = Vec::new();
        for number in 0..16 {
            todos.push(
                owners[number % 2].create_todo_with(Todo { state: 2, ..todo_titled("old") }).await,
            );
        }
        let mut lock = app.hold_lock(lock).await;
        let request_ids: Vec<_> = (0..48).map(|_| unique_name("updates-")).collect();
        let calls = request_ids.iter().enumerate().map(|(call, request_id)| {
            let (number, kind) = (call % 16, call / 16);
            let reader = owners[number % 2].clone();
            let client = reader.clone().with_metadata("x-request-id", request_id);
            let old = todos[number].clone();
            let title = call.to_string();
            async move {
                let id = if kind == 1 { uuid::Uuid::now_v7().to_string() } else { old.id.clone() };
                // A wrong etag, a missing todo, and another field without an etag.
                let (etag, title) =
                    if kind == 0 { ("1".into(), title) } else { (String::new(), title) };
                let new = Todo { id, etag, title: title.clone(), ..Todo::default() };
                let result = client.try_update_todo(Some(new), None).await;
                match kind {
                    0 => drop(assert_status(result, Code::Aborted, "ETAG_MISMATCH")),
                    1 => drop(assert_status(result, Code::NotFound, "TODO_NOT_FOUND")),
                    _ => {
                        let updated = result.expect("updated").into_inner().todo.expect("a todo");
                        assert_eq!((&updated.title, updated.state), (&title, 2));
                        assert_eq!(reader.get_todo(&old.id).await, updated);
                        return Some(updated.etag);
                    }
                }
                None
            }
        });
        let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
        app.wait_until_in_flight(48).await;
        lock.wait_until_blocking().await;
        lock.release().await;
        let etags: Vec<_> = calls.await.expect("no panic").into_iter().flatten().collect();
        assert_eq!(etags.len(), 16);
        let newest = "select count(*) from todo_clocks as clock where version >= (
            select max(version) from todos where owner_id = clock.owner_id
        )";
        assert_eq!(app.fetch_scalar::<i64>(newest).await, 2);
        let statements: usize = request_ids.iter().map(|id| statement_count(id)).sum();
        println!("{statements} statements");
        // A missing todo has one of its own, and a wrong etag one more, to report the current one.
        assert!(statements <= 48 + 10, "{statements} statements for 48 updates");
    }
}

/// A statement changes a row once, so updates of the same todo follow each other.
#[tokio::test]
async fn updates_of_one_todo_at_the_same_time_are_all_applied() {
    let app = App::start_with(config_with_metrics()).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("old").await;
    let lock = app.hold_lock("select from todo_clocks for update").await;
    let calls = (0..24).map(|number| {
        let (ana, id) = (ana.clone(), todo.id.clone());
        let mask: &[&str] = if number % 2 == 0 { &["title"] } else { &["description"] };
        async move {
            let new = Todo { id, description: "new".into(), ..todo_titled("new") };
            ana.update_todo(new, Some(mask)).await.etag
        }
    });
    let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
    app.wait_until_in_flight(24).await;
    lock.release().await;
    let etags: BTreeSet<_> = calls.await.expect("no panic").into_iter().collect();
    assert_eq!(etags.len(), 24);
    let updated = ana.get_todo(&todo.id).await;
    assert_eq!((&*updated.title, &*updated.description), ("new", "new"));
    assert_eq!(etags.last(), Some(&updated.etag));
}

#[tokio::test]
async fn a_call_that_is_cancelled_in_the_queue_inserts_nothing() {
    let app = App::start_with(config_with_metrics()).await;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold_lock(LOCK).await;
    let first = app.occupy_permits(&mut lock, &ana).await;
    let cancelled = create(ana.clone(), "never mind");
    let remaining = create(ana.clone(), "remaining");
    app.wait_until_in_flight(4).await;
    cancelled.abort();
    app.wait_until_in_flight(3).await;
    let late = create(ana.clone().with_metadata("grpc-timeout", "100m"), "too late");
    late.await.expect("no panic").expect_err("the deadline expires in the queue");
    app.wait_until_in_flight(3).await;
    lock.release().await;
    for added in first.into_iter().chain([remaining]) {
        added.await.expect("no panic").expect("added");
    }
    let todos = ana.list_all_todos(ListTodosRequest::default()).await;
    let mut titles: Vec<_> = todos.iter().map(|todo| &*todo.title).collect();
    titles.sort_unstable();
    assert_eq!(titles, ["remaining", "the first", "the first"]);
}
