//! Deleting todos, restoring and purging them.

use std::time::Duration;

use fast_zero::proto::todo::v1::{
    DeletedTodo, ListDeletedTodosRequest, ListTodosRequest, SyncTodosRequest, Todo, TodoState,
};
use prost::Message;
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    App,
    assert::{assert_invalid, assert_status},
    changes::described,
    time::to_system_time,
    todos::{discard_message, todo_titled},
};

const DAY: Duration = Duration::from_hours(24);
const NOT_DELETED: &str = "TODO_NOT_DELETED";

/// Returns the todo of a deletion, without what the deletion changes.
fn unchanged(todo: &Todo) -> Todo {
    Todo { update_time: None, etag: String::new(), ..todo.clone() }
}

/// Moves the deletions back by some days.
async fn age_trash(app: &App, days: u32) {
    let statement =
        format!("update todo_trash set version = version - {days} * 86400000000::bigint");
    let statement = sqlx::AssertSqlSafe(statement);
    sqlx::raw_sql(statement).execute(&mut app.connect_database().await).await.expect("aged");
}

#[tokio::test]
async fn a_deletion_returns_the_todo_with_the_times_of_the_deletion_and_the_purge() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = Todo { description: "two litres".into(), state: 3, ..todo_titled("milk") };
    let todo = ana.create_todo_with(todo).await;
    let DeletedTodo { todo: deleted, delete_time, purge_time } = ana.delete_todo(&todo.id).await;
    let deleted = deleted.expect("a todo");
    assert_eq!(unchanged(&deleted), unchanged(&todo));
    assert_ne!(deleted.etag, todo.etag);
    assert_eq!(deleted.update_time, delete_time);
    assert!(to_system_time(delete_time) > to_system_time(todo.update_time));
    assert_eq!(to_system_time(purge_time), to_system_time(delete_time) + 30 * DAY);
}

#[tokio::test]
async fn an_undeleted_todo_is_a_todo_like_before_with_a_new_version() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for state in [TodoState::Draft, TodoState::Trash] {
        let todo = Todo { description: "Ça\nva".into(), state: state.into(), ..todo_titled("É") };
        let todo = ana.create_todo_with(todo).await;
        let deleted = ana.delete_todo(&todo.id).await;
        let restored = ana.undelete_todo(&todo.id).await;
        assert_eq!(unchanged(&restored), unchanged(&todo));
        assert!(to_system_time(restored.update_time) > to_system_time(deleted.delete_time));
        assert_eq!(ana.get_todo(&todo.id).await, restored);
        // The folded texts are restored, too.
        let filter =
            ListTodosRequest { title: "é".into(), description: "ça".into(), ..<_>::default() };
        assert_eq!(ana.list_todos(filter).await.todos, std::slice::from_ref(&restored));
        assert_eq!(ana.list_deleted_todos(0).await, []);
        let updated = ana.update_todo(Todo { title: "new".into(), ..restored }, None).await;
        ana.try_purge_todo(&todo.id, &updated.etag).await.expect("deleted again");
    }
}

#[tokio::test]
async fn a_todo_that_is_not_deleted_cannot_be_undeleted() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (todo, deleted) = (ana.create_todo("a").await, ana.create_todo("b").await);
    ana.delete_todo(&deleted.id).await;
    let status =
        assert_status(ana.try_undelete_todo(&todo.id).await, Code::AlreadyExists, NOT_DELETED);
    assert_eq!(status.message(), "Task is not deleted.");
    assert_eq!(ana.get_todo(&todo.id).await, todo);
    let never = Uuid::now_v7().to_string();
    for rejected in [
        ana.try_undelete_todo(&never).await,
        bob.try_undelete_todo(&todo.id).await,
        bob.try_undelete_todo(&deleted.id).await,
    ] {
        let status = assert_status(rejected, Code::NotFound, "TODO_NOT_FOUND");
        assert_eq!(status.message(), "Task not found.");
    }
    assert_invalid(ana.try_undelete_todo("1").await, &["id"]);
    ana.undelete_todo(&deleted.id).await;
    assert_status(ana.try_undelete_todo(&deleted.id).await, Code::AlreadyExists, NOT_DELETED);
}

#[tokio::test]
async fn a_purge_takes_the_content_of_a_todo_at_once() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("secret").await;
    let rejected = ana.try_purge_todo(&todo.id, "1").await;
    assert_status(rejected, Code::Aborted, "ETAG_MISMATCH");
    let purged = ana.try_purge_todo(&todo.id, &todo.etag).await.expect("purged");
    let purged = purged.into_inner().deleted.expect("a deleted todo");
    assert_eq!(purged.purge_time, purged.delete_time);
    let left = purged.todo.expect("a todo");
    assert_eq!(left, Todo { id: todo.id.clone(), etag: left.etag.clone(), ..Todo::default() });
    assert!(to_system_time(purged.delete_time) > to_system_time(todo.update_time));

    assert_eq!(ana.list_deleted_todos(0).await, []);
    for rejected in [
        ana.try_undelete_todo(&todo.id).await.map(discard_message),
        ana.try_get_todo(&todo.id).await.map(discard_message),
        ana.try_delete_todo(&todo.id, "").await.map(discard_message),
        ana.try_purge_todo(&todo.id, "").await.map(discard_message),
        ana.try_purge_todo(&todo.id, &left.etag).await.map(discard_message),
    ] {
        assert_status(rejected, Code::NotFound, "TODO_NOT_FOUND");
    }
    let stored = "select count(*) from todo_trash where todo_trash::text like '%secret%'";
    assert_eq!(app.fetch_scalar::<i64>(stored).await, 0);
}

#[tokio::test]
async fn a_purge_of_a_deleted_todo_is_a_change_of_its_own() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let todo = ana.create_todo("a").await;
    let deleted = ana.delete_todo(&todo.id).await;
    let etag = deleted.todo.expect("a todo").etag;
    assert_status(bob.try_purge_todo(&todo.id, "").await, Code::NotFound, "TODO_NOT_FOUND");
    let rejected = ana.try_purge_todo(&todo.id, &todo.etag).await;
    assert_status(rejected, Code::Aborted, "ETAG_MISMATCH");
    assert_eq!(ana.list_deleted_todos(0).await.len(), 1);
    let purged = ana.try_purge_todo(&todo.id, &etag).await.expect("purged");
    let purged = purged.into_inner().deleted.expect("a deleted todo");
    assert!(to_system_time(purged.delete_time) > to_system_time(deleted.delete_time));
    assert_eq!(ana.list_deleted_todos(0).await, []);
    let version = app.fetch_scalar::<i64>("select version from todo_clocks").await;
    assert_eq!(purged.todo.expect("a todo").etag, version.to_string());
}

#[tokio::test]
async fn deleted_todos_are_listed_by_pages_the_newest_first() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let mut deleted = Vec::new();
    for title in ["a", "b", "c", "d", "e"] {
        let todo = ana.create_todo(title).await;
        deleted.insert(0, ana.delete_todo(&todo.id).await);
    }
    bob.create_todo("of bob").await;
    for page_size in [0, 1, 2, 4, 5, 1_000] {
        assert_eq!(ana.list_deleted_todos(page_size).await, deleted, "{page_size}");
    }
    assert_eq!(bob.list_deleted_todos(0).await, []);
    assert_eq!(ana.list_todos(ListTodosRequest::default()).await.todos, []);

    let page = |page_size, page_token: &str| {
        let page_token = page_token.to_owned();
        ListDeletedTodosRequest { page_size, page_token }
    };
    let token = ana.try_list_deleted_todos(page(2, "")).await.expect("listed");
    let token = token.into_inner().next_page_token;
    assert_invalid(ana.try_list_deleted_todos(page(-1, "x")).await, &["page_size", "page_token"]);
    assert_invalid(bob.try_list_deleted_todos(page(2, &token)).await, &["page_token"]);
    let other = ListTodosRequest { page_token: token.clone(), ..<_>::default() };
    assert_invalid(ana.try_list_todos(other).await, &["page_token"]);
    // The todo after the cursor disappears, another one appears before it.
    ana.undelete_todo(&deleted[2].todo.as_ref().expect("a todo").id).await;
    let new = ana.create_todo("new").await;
    ana.delete_todo(&new.id).await;
    let rest = ana.try_list_deleted_todos(page(9, &token)).await.expect("listed").into_inner();
    assert_eq!(rest.deleted_todos, deleted[3..]);
    assert_eq!(rest.next_page_token, "");
}

#[tokio::test]
async fn pages_of_deleted_todos_stay_below_1_mib() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for _ in 0..60 {
        let todo = Todo { description: "🦀".repeat(10_000), ..todo_titled("long") };
        let todo = ana.create_todo_with(todo).await;
        ana.delete_todo(&todo.id).await;
    }
    let (mut page_token, mut count) = (String::new(), 0);
    loop {
        let request = ListDeletedTodosRequest { page_token, page_size: 1_000 };
        // The client has tonic's default limits.
        let page = ana.try_list_deleted_todos(request).await.expect("listed").into_inner();
        assert!(page.encoded_len() < 1024 * 1024, "{}", page.encoded_len());
        count += page.deleted_todos.len();
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(count, 60);

    // A thousand of medium size, whose ids and times count.
    let insert = "insert into todo_trash
        select owner_id, gen_random_uuid(), repeat('𠀀', 200), '', repeat('a', 140), '', 1,
            version + n
        from todo_clocks, generate_series(1, 1000) as n";
    app.execute(insert).await;
    let page = ListDeletedTodosRequest { page_size: 1_000, ..<_>::default() };
    let page = ana.try_list_deleted_todos(page).await.expect("listed").into_inner();
    assert!(page.encoded_len() < 1024 * 1024, "{}", page.encoded_len());
}

#[tokio::test]
async fn a_deleted_account_takes_its_deleted_todos_with_it() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    ana.delete_todo(&todo.id).await;
    ana.try_delete_user("me", "").await.expect("deleted");
    let left = "select (select count(*) from todo_trash) + (select count(*) from todo_clocks)";
    assert_eq!(app.fetch_scalar::<i64>(left).await, 0);
}

#[tokio::test]
async fn a_purge_time_counts_from_the_deletion() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let deleted = ana.delete_todo(&todo.id).await;
    age_trash(&app, 7).await;
    let [aged] = &ana.list_deleted_todos(0).await[..] else { panic!("one deleted todo") };
    let moved = |time, days| Some(to_system_time(time) - days * DAY);
    assert_eq!(Some(to_system_time(aged.delete_time)), moved(deleted.delete_time, 7));
    assert_eq!(Some(to_system_time(aged.purge_time)), moved(deleted.purge_time, 7));
}

/// The sweep comes up to an hour later. Here it does not come at all.
#[tokio::test]
async fn from_its_purge_time_on_a_todo_is_purged_for_callers() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (old, recent) = (ana.create_todo("old").await, ana.create_todo("recent").await);
    let deleted = ana.delete_todo(&old.id).await;
    ana.delete_todo(&recent.id).await;
    age_trash(&app, 30).await;
    let minute = "update todo_trash set version = version + 60000000 where title = 'recent'";
    app.execute(minute).await;
    let [listed] = &ana.list_deleted_todos(0).await[..] else { panic!("one is not purged") };
    assert_eq!(listed.todo.as_ref().expect("a todo").title, "recent");
    let version = deleted.todo.expect("a todo").etag.parse::<i64>().expect("a version");
    let etag = (version - 30 * 86_400_000_000).to_string();
    for rejected in [
        ana.try_undelete_todo(&old.id).await.map(discard_message),
        ana.try_purge_todo(&old.id, "").await.map(discard_message),
        ana.try_purge_todo(&old.id, &etag).await.map(discard_message),
    ] {
        assert_status(rejected, Code::NotFound, "TODO_NOT_FOUND");
    }
    let synced = ana.sync_todos(SyncTodosRequest::default()).await;
    assert_eq!(described(&synced.changes), ["-", "-recent"]);
    // The sweep did not purge it in the meantime.
    assert_eq!(app.fetch_scalar::<i64>("select count(title) from todo_trash").await, 2);
    ana.undelete_todo(&recent.id).await;
}
