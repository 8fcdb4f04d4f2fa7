//! Calls after a lost connection, and next to cancelled calls.

use std::time::{Duration, Instant};

use fast_zero::proto::{
    todo::v1::{ListTodosRequest, Todo},
    user::v1::UpdateUserResponse,
};
use tonic::{Code, Response};
use tonic_types::StatusExt;

use crate::support::{
    App, RpcResult,
    app::config,
    assert::{assert_hides_cause, assert_status},
    parallel::join_all,
    todos::discard_message,
    users::own_user,
    wait::wait_until,
};

#[tokio::test]
async fn a_statement_of_a_cancelled_call_blocks_no_other_call() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold_lock("select from users for update").await;
    let cancelled = tokio::spawn({
        let ana = ana.clone();
        async move { ana.try_update_user(Some(own_user("new", "")), None).await }
    });
    lock.wait_until_blocked_by(1).await;
    cancelled.abort();
    for _ in 0..3 * config().limits.database_max_connections {
        ana.get_user("me").await;
    }
    lock.wait_until_blocked_by(1).await;
    lock.release().await;
}

#[tokio::test]
async fn calls_recover_after_the_database_has_closed_all_connections() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let unguarded = Todo { etag: String::new(), ..todo.clone() };
    for write in [false, true] {
        app.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()",
        )
        .await;
        let mut responses = Vec::new();
        for _ in 0..12 {
            responses.push(if write {
                ana.try_update_todo(Some(unguarded.clone()), None).await.map(discard_message)
            } else {
                ana.try_get_todo(&todo.id).await.map(discard_message)
            });
        }
        assert!(responses.last().is_some_and(Result::is_ok), "{responses:?}");
        let failed: Vec<_> = responses.into_iter().filter_map(Result::err).collect();
        // One failed call discards all closed connections.
        assert!(failed.len() <= 1, "{failed:?}");
        for status in failed {
            let status = assert_status(
                Err::<Response<()>, _>(status),
                Code::Unavailable,
                "DATABASE_UNAVAILABLE",
            );
            assert!(status.get_details_retry_info().is_some());
            assert_hides_cause(&status);
        }
    }
}

/// A migration of the next version may change the type of a column, and each connection has
/// prepared its statements before.
#[tokio::test]
async fn a_column_with_another_type_fails_at_most_one_call() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let list = || ListTodosRequest { page_size: 1_000, ..<_>::default() };
    let connections = config().limits.database_max_connections;
    let mut lock = app.hold_lock("lock table todos in access exclusive mode").await;
    let lists: Vec<_> = (0..connections)
        .map(|_| {
            let ana = ana.clone();
            tokio::spawn(async move { ana.list_todos(list()).await })
        })
        .collect();
    lock.wait_until_blocked_by(connections.into()).await;
    lock.release().await;
    for list in lists {
        list.await.expect("listed");
    }
    app.execute("alter table todos alter title type varchar(1000)").await;

    let mut responses = Vec::new();
    for _ in 0..2 * connections {
        responses.push(ana.try_list_todos(list()).await);
    }
    for response in &responses[1..] {
        let response = response.as_ref().expect("listed").get_ref();
        assert_eq!(response.todos, std::slice::from_ref(&todo));
    }
    if let Some(failed @ Err(_)) = responses.into_iter().next() {
        let status = assert_status(failed, Code::Unavailable, "DATABASE_UNAVAILABLE");
        assert!(status.get_details_retry_info().is_some());
        assert_hides_cause(&status);
    }
}

#[tokio::test]
async fn a_cancelled_call_does_not_affect_other_calls() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (locked, free) = (ana.create_todo("locked").await, ana.create_todo("free").await);
    let mut locked_row = app.lock_todo(&locked.id).await;
    tokio::select! {
        response = ana.try_delete_todo(&locked.id, "") => panic!("not locked: {response:?}"),
        () = locked_row.wait_until_blocking() => {}
    }
    // More calls than connections, while the cancelled statement still waits and afterwards.
    for _ in 0..8 {
        assert_eq!(ana.get_todo(&free.id).await, free);
    }
    locked_row.release().await;
    for _ in 0..8 {
        assert_eq!(ana.get_todo(&free.id).await, free);
    }
}

#[tokio::test]
async fn a_call_waits_for_a_connection_for_a_part_of_its_deadline() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let updates = updates_on_all_connections(&app, None).await;
    let mut lock = app.hold_lock("select from users for update").await;
    let updates: Vec<_> = updates.into_iter().map(tokio::spawn).collect();
    lock.wait_until_blocked_by(config().limits.database_max_connections.into()).await;
    let refused = ana.try_get_todo(&todo.id).await;
    assert_status(refused, Code::Unavailable, "DATABASE_UNAVAILABLE");
    lock.release().await;
    for update in updates {
        update.await.expect("no panic").expect("updated");
    }
}

/// Returns an update of another user for each connection of the pool: writes to todos leave some
/// connections to other calls.
async fn updates_on_all_connections(
    app: &App,
    deadline: Option<&str>,
) -> Vec<impl Future<Output = RpcResult<UpdateUserResponse>> + Send + 'static> {
    let mut updates = Vec::new();
    for number in 0..config().limits.database_max_connections {
        let mut user = app.signed_up(&format!("other{number}")).await;
        if let Some(deadline) = deadline {
            user = user.with_metadata("grpc-timeout", deadline);
        }
        updates.push(async move {
            user.try_update_user(Some(own_user(&format!("new{number}"), "")), None).await
        });
    }
    updates
}

#[tokio::test]
async fn a_cancelled_call_holds_its_connection_for_five_seconds_at_most() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let updates = updates_on_all_connections(&app, Some("500m")).await;
    app.execute(
        "create function sleep() returns trigger language plpgsql as
         $$ begin perform pg_sleep(60); return null; end $$;
         create trigger sleep before update on users
         for each statement execute function sleep()",
    )
    .await;
    let started = Instant::now();
    for ended in join_all(updates).await {
        ended.expect_err("its statement takes longer");
    }
    wait_until("a connection is free", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
    // The statements themselves end after ten seconds.
    let took = started.elapsed();
    assert!((Duration::from_secs(2)..Duration::from_secs(8)).contains(&took), "{took:?}");
}
