//! Getting and deleting todos by ID.

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    App,
    assert::{assert_invalid, assert_status},
    todos::{discard_message, todo_titled},
};

#[tokio::test]
async fn a_deleted_todo_is_not_found() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (deleted, remaining) =
        (ana.create_todo("deleted").await, ana.create_todo("remaining").await);
    ana.try_delete_todo(&deleted.id, "").await.expect("deleted");

    assert_status(ana.try_get_todo(&deleted.id).await, Code::NotFound, "TODO_NOT_FOUND");
    assert_status(ana.try_delete_todo(&deleted.id, "").await, Code::NotFound, "TODO_NOT_FOUND");
    assert_eq!(ana.list_todos(ListTodosRequest::default()).await.todos, [remaining]);
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from todos").await, 1);
}

#[tokio::test]
async fn another_users_todo_is_not_found() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let todo = ana.create_todo("ana's").await;
    let never = Todo { id: Uuid::now_v7().to_string(), ..todo.clone() };
    for Todo { id, etag, .. } in [&todo, &never] {
        let update = |etag: &str| Todo { id: id.clone(), etag: etag.to_owned(), ..todo.clone() };
        for rejected in [
            bob.try_get_todo(id).await.map(discard_message),
            bob.try_update_todo(Some(update("")), None).await.map(discard_message),
            bob.try_update_todo(Some(update(etag)), None).await.map(discard_message),
            bob.try_update_todo(Some(update("x")), Some(&["*"])).await.map(discard_message),
            bob.try_delete_todo(id, "").await.map(discard_message),
            bob.try_delete_todo(id, etag).await.map(discard_message),
            bob.try_delete_todo(id, "x").await.map(discard_message),
        ] {
            let status = assert_status(rejected, Code::NotFound, "TODO_NOT_FOUND");
            assert_eq!(status.message(), "Task not found.");
        }
    }
    assert_eq!(ana.get_todo(&todo.id).await, todo);
    assert_eq!(ana.list_todos(ListTodosRequest::default()).await.todos, [todo]);
    assert_eq!(bob.list_todos(ListTodosRequest::default()).await.todos, []);
}

#[tokio::test]
async fn an_id_has_one_spelling() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let id = ana.create_todo("a").await.id;
    for invalid in [
        "",
        "me",
        "1",
        "99999999999999999999",
        &id.to_uppercase(),
        &id.replace('-', ""),
        &format!("{{{id}}}"),
        &format!("urn:uuid:{id}"),
        &format!(" {id}"),
        &format!("{id}\n"),
        &format!("{id}0"),
        &id[..35],
        &id.replace('-', "\u{2010}"),
    ] {
        assert_invalid(ana.try_get_todo(invalid).await, &["id"]);
        assert_invalid(ana.try_delete_todo(invalid, "").await, &["id"]);
        let todo = Todo { id: invalid.to_owned(), ..todo_titled("b") };
        assert_invalid(ana.try_update_todo(Some(todo), None).await, &["todo.id"]);
    }
    assert_eq!(ana.get_todo(&id).await.title, "a");
}
