//! Calls that share a statement.

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

/// Keeps everybody from the to-dos.
const LOCK: &str = "lock table todos in access exclusive mode";

/// As many as there are turns.
const STATEMENTS_AT_ONCE: i64 = 2;

impl App {
    /// Waits until the tasks wait for the lock, so that who comes next waits for them.
    async fn until_busy(&self, lock: &mut RowLock, ana: &Client) -> Vec<Call> {
        let mut calls = Vec::new();
        for statements in 1..=STATEMENTS_AT_ONCE {
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
async fn calls_at_once_share_statements_and_each_gets_its_own_answer() {
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
            // Each is asked for by its owner twice, and twice by somebody else.
            let (number, caller) = (call % 16, call / 16 % 2);
            let client = owners[caller].clone().with_metadata("x-request-id", request_id);
            let todo = (caller == number % 2).then(|| wanted[number].clone());
            let id = wanted[number].id.clone();
            async move { (client.try_get_todo(&id).await, todo) }
        });
        let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
        app.wait_until_in_flight(64).await;
        lock.release().await;
        for (answer, todo) in calls.await.expect("no panic") {
            match todo {
                Some(todo) => assert_eq!(answer.expect("found").into_inner().todo, Some(todo)),
                None => drop(assert_status(answer, Code::NotFound, "TODO_NOT_FOUND")),
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
async fn lists_at_once_share_statements_and_each_gets_its_own_page() {
    let app = App::start_with(config_with_metrics()).await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (cid, dot) = (app.signed_up("cid").await, app.signed_up("dot").await);
    for number in 0..7 {
        ana.create_todo(&number.to_string()).await;
        bob.create_todo("of bob").await;
    }
    // More than an answer may have.
    for _ in 0..30 {
        dot.create_todo_with(Todo {
            description: "\u{10348}".repeat(10_000),
            ..todo_titled("long")
        })
        .await;
    }
    let page = |page_size| ListTodosRequest { page_size, ..ListTodosRequest::default() };
    let mut asked = Vec::new();
    for (caller, size) in
        [(&ana, 1), (&ana, 6), (&ana, 7), (&bob, 3), (&bob, 100), (&cid, 10), (&dot, 100)]
    {
        // One after the other, each is asked for alone.
        let alone = caller.list_todos(page(size)).await;
        if !alone.next_page_token.is_empty() {
            let next = ListTodosRequest { page_token: alone.next_page_token.clone(), ..page(size) };
            let wanted = caller.list_todos(next.clone()).await;
            asked.push((caller.clone(), next, wanted));
        }
        asked.push((caller.clone(), page(size), alone));
    }
    assert_eq!(asked.len(), 11, "four of them go on");
    let lock = app.hold_lock(LOCK).await;
    let request_ids: Vec<_> = asked.iter().map(|_| unique_name("coalesced-")).collect();
    let calls = asked.into_iter().zip(&request_ids).map(|((caller, request, wanted), id)| {
        let caller = caller.with_metadata("x-request-id", id);
        async move { (caller.try_list_todos(request).await, wanted) }
    });
    let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
    app.wait_until_in_flight(11).await;
    lock.release().await;
    for (answer, wanted) in calls.await.expect("no panic") {
        assert_eq!(answer.expect("listed").into_inner(), wanted);
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
async fn an_owner_who_is_gone_keeps_nobody_else_from_adding() {
    let app = App::start_with(config_with_metrics()).await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    // The session was just seen alive, and the service is not told.
    bob.create_todo("the last one").await;
    app.execute("delete from users where username = 'bob'").await;
    let mut lock = app.hold_lock(LOCK).await;
    let first = app.until_busy(&mut lock, &ana).await;
    let of_ana: Vec<_> = (0..4).map(|_| create(ana.clone(), "one more")).collect();
    let of_bob = create(bob, "too late");
    app.wait_until_in_flight(7).await;
    lock.release().await;
    for added in first.into_iter().chain(of_ana) {
        added.await.expect("no panic").expect("added");
    }
    let refused = of_bob.await.expect("no panic").map(tonic::Response::new);
    assert_status(refused, Code::Unauthenticated, "SESSION_REVOKED");
    assert_eq!(ana.list_all_todos(ListTodosRequest::default()).await.len(), 6);
}

#[tokio::test]
async fn an_owner_who_is_being_deleted_holds_up_nobody_else() {
    let app = App::start_with(config_with_metrics()).await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let mut lock = app.hold_lock(LOCK).await;
    let first = app.until_busy(&mut lock, &ana).await;
    let of_bob = [create(bob.clone(), "one"), create(bob.clone(), "two")];
    let of_ana = [create(ana.clone(), "one more"), create(ana.clone(), "another")];
    app.wait_until_in_flight(6).await;
    let deletion = app.hold_lock("select from users where username = 'bob' for update").await;
    lock.release().await;
    for added in first.into_iter().chain(of_ana) {
        added.await.expect("no panic").expect("added");
    }
    ana.create_todo("and later, too").await;
    assert!(of_bob.iter().all(|call| !call.is_finished()), "they wait for the deletion");
    deletion.release().await;
    for added in of_bob {
        added.await.expect("no panic").expect("added: it came to nothing");
    }
    assert_eq!(bob.list_all_todos(ListTodosRequest::default()).await.len(), 2);
}

#[tokio::test]
async fn a_call_that_is_given_up_before_its_turn_adds_nothing() {
    let app = App::start_with(config_with_metrics()).await;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold_lock(LOCK).await;
    let first = app.until_busy(&mut lock, &ana).await;
    let given_up = create(ana.clone(), "never mind");
    let kept = create(ana.clone(), "kept");
    app.wait_until_in_flight(4).await;
    given_up.abort();
    app.wait_until_in_flight(3).await;
    let late = create(ana.clone().with_metadata("grpc-timeout", "100m"), "too late");
    late.await.expect("no panic").expect_err("its deadline comes before its turn");
    app.wait_until_in_flight(3).await;
    lock.release().await;
    for added in first.into_iter().chain([kept]) {
        added.await.expect("no panic").expect("added");
    }
    let todos = ana.list_all_todos(ListTodosRequest::default()).await;
    let mut titles: Vec<_> = todos.iter().map(|todo| &*todo.title).collect();
    titles.sort_unstable();
    assert_eq!(titles, ["kept", "the first", "the first"]);
}
