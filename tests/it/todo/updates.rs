//! Updates of todos: masks and etags.

use std::collections::BTreeSet;

use fast_zero::proto::todo::v1::{Todo, TodoState, UpdateTodoResponse};
use prost_types::Timestamp;
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    App, Client, READ_ONLY_PATHS, RpcResult,
    assert::{assert_invalid, assert_status},
    parallel::join_all,
    time::to_system_time,
    todos::todo_titled,
};

const DOING: i32 = TodoState::Doing as i32;
const DONE: i32 = TodoState::Done as i32;
const MISMATCH: &str = "ETAG_MISMATCH";

fn todo(title: &str, description: &str, state: i32) -> Todo {
    Todo { description: description.into(), state, ..todo_titled(title) }
}

/// Returns the fields that an update can change.
fn content(todo: &Todo) -> (&str, &str, i32) {
    (&todo.title, &todo.description, todo.state)
}

#[tokio::test]
async fn an_update_changes_the_fields_of_its_mask_or_those_that_are_set() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (mask, new, expected) in [
        (None, todo("new", "", 0), ("new", "old", DOING)),
        (None, todo("", "new", 0), ("old", "new", DOING)),
        (None, todo("", "", DONE), ("old", "old", DONE)),
        (None, todo("new", "new", DONE), ("new", "new", DONE)),
        (Some(&[][..]), todo("new", "", 0), ("new", "old", DOING)),
        (Some(&["title"]), todo("new", "new", DONE), ("new", "old", DOING)),
        (Some(&["description"]), todo("new", "new", DONE), ("old", "new", DOING)),
        (Some(&["description"]), todo("new", "", DONE), ("old", "", DOING)),
        (Some(&["state"]), todo("new", "new", DONE), ("old", "old", DONE)),
        (Some(&["state", "title"]), todo("new", "new", DONE), ("new", "old", DONE)),
        (Some(&["title", "title"]), todo("new", "new", DONE), ("new", "old", DOING)),
        (Some(&["*"]), todo("new", "new", DONE), ("new", "new", DONE)),
        (Some(&["*"]), todo("new", "", DONE), ("new", "", DONE)),
        // Updated texts are normalized like those of new todos.
        (None, todo(" e\u{301} ", "a\r\nb\n", 0), ("\u{e9}", "a\nb", DOING)),
        (Some(&["description"]), todo("", " \n", 0), ("old", "", DOING)),
        // Only masked fields have to be valid.
        (Some(&["title"]), todo("new", "\0", 99), ("new", "old", DOING)),
        (Some(&["state"]), todo("\0", "\0", DONE), ("old", "old", DONE)),
    ] {
        let old = ana.create_todo_with(todo("old", "old", DOING)).await;
        let new = Todo { id: old.id.clone(), ..new };
        let updated = ana.update_todo(new.clone(), mask).await;
        assert_eq!(content(&updated), expected, "{mask:?} {new:?}");
        assert_eq!((&updated.id, updated.create_time), (&old.id, old.create_time));
        assert_eq!(ana.get_todo(&old.id).await, updated);
    }
}

#[tokio::test]
async fn an_update_without_a_mask_ignores_read_only_fields() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo("old").await;
    let epoch = Some(Timestamp::default());
    let new = Todo { create_time: epoch, update_time: epoch, title: "new".into(), ..old.clone() };
    let updated = ana.update_todo(new, None).await;
    assert_eq!((&*updated.title, updated.create_time), ("new", old.create_time));
    assert!(to_system_time(updated.update_time) > to_system_time(old.update_time));

    // Every path of the message, as generated clients send them.
    let mask = [&["title", "description", "state"], &READ_ONLY_PATHS[..]].concat();
    let new = Todo { title: "newer".into(), ..updated };
    let updated = ana.update_todo(new, Some(&mask)).await;
    assert_eq!((&*updated.title, updated.create_time), ("newer", old.create_time));
}

/// AIP-203: a client may send back what it read.
#[tokio::test]
async fn read_only_fields_in_a_mask_are_ignored() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo("old").await;
    let epoch = Some(Timestamp::default());
    let new = Todo { create_time: epoch, update_time: epoch, title: "new".into(), ..old.clone() };
    let mask = ["id", "title", "create_time", "update_time"];
    let updated = ana.update_todo(new, Some(&mask)).await;
    assert_eq!((&*updated.title, updated.create_time), ("new", old.create_time));
    assert!(to_system_time(updated.update_time) > to_system_time(old.update_time));
}

#[tokio::test]
async fn all_invalid_fields_of_an_update_are_reported_and_nothing_changes() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo_with(todo("old", "old", DOING)).await;
    let update = async |new: Todo, mask, invalid: &[&str]| {
        let new = Todo { id: old.id.clone(), ..new };
        assert_invalid(ana.try_update_todo(Some(new), mask).await, invalid);
    };
    for mask in [
        &["*", "title"][..],
        &["*", "*"],
        &["title", "*"],
        &["nothing"],
        &["title", "nothing"],
        &["id"],
        &["etag"],
        &["create_time"],
        &["update_time"],
        &["id", "create_time", "update_time", "update_time.seconds", "etag"],
        &["title", "etag.x"],
        &["title", "update_time.hours"],
        &["nothing", "update_time"],
        &["todo.title"],
        &["Title"],
        &[" title"],
        &["title,state"],
        &["title.x"],
        &[""],
        &["title", ""],
    ] {
        update(todo("new", "new", DONE), Some(mask), &["update_mask"]).await;
    }
    // No writable field is set.
    let read_only =
        Todo { etag: old.etag.clone(), create_time: old.create_time, ..todo("", "", 0) };
    for mask in [None, Some(&[][..])] {
        update(read_only.clone(), mask, &["update_mask"]).await;
    }
    let long = "a".repeat(10_001);
    let all = ["todo.title", "todo.description", "todo.state"];
    update(todo("\0", &long, 99), None, &all).await;
    update(todo("", &long, 0), Some(&["*"]), &all).await;
    update(todo("  ", "", 0), None, &["todo.title"]).await;
    update(todo("", "", 0), Some(&["title"]), &["todo.title"]).await;
    update(todo("a", "a", 0), Some(&["state"]), &["todo.state"]).await;
    update(todo("a", "a", 0), Some(&["*"]), &["todo.state"]).await;

    let nameless = todo("\0", "", 99);
    let rejected = ana.try_update_todo(Some(nameless), None).await;
    assert_invalid(rejected, &["todo.id", "todo.title", "todo.state"]);
    let rejected = ana.try_update_todo(Some(todo("a", "", 0)), Some(&["nothing"])).await;
    assert_invalid(rejected, &["todo.id", "update_mask"]);
    assert_eq!(ana.get_todo(&old.id).await, old);
}

#[tokio::test]
async fn an_update_without_a_todo_is_rejected() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    assert_invalid(ana.try_update_todo(None, None).await, &["todo"]);
    assert_invalid(ana.try_update_todo(None, Some(&["title"])).await, &["todo"]);
    let rejected = ana.try_update_todo(None, Some(&["nothing"])).await;
    assert_invalid(rejected, &["todo", "update_mask"]);
}

#[tokio::test]
async fn an_update_with_equal_values_still_creates_a_new_version() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut last = ana.create_todo_with(todo("same", "same", DOING)).await;
    let mut etags = BTreeSet::from([last.etag.clone()]);
    for mask in [None, Some(&["*"][..]), Some(&["title"]), Some(&["state"]), None] {
        let updated = ana.update_todo(last.clone(), mask).await;
        assert_eq!(content(&updated), content(&last));
        assert!(etags.insert(updated.etag.clone()), "{mask:?}: {} again", updated.etag);
        assert!(to_system_time(updated.update_time) > to_system_time(last.update_time), "{mask:?}");
        last = updated;
    }
}

/// Returns etags that no todo has.
fn garbage(etag: &str) -> Vec<String> {
    let garbage = ["x", "0", "-1", "99999999999999999999", "🦀", "\0", " "].map(str::to_owned);
    let similar =
        [format!(" {etag}"), format!("{etag} "), format!("0{etag}"), format!("\"{etag}\"")];
    garbage.into_iter().chain(similar).chain(["1".repeat(10_000)]).collect()
}

#[tokio::test]
async fn an_etag_mismatch_rejects_an_update() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let first = ana.create_todo("first").await;
    let second = ana.update_todo(Todo { title: "second".into(), ..first.clone() }, None).await;
    for etag in garbage(&second.etag).into_iter().chain([first.etag]) {
        for mask in [None, Some(&["*"][..])] {
            let new = Todo { etag: etag.clone(), id: second.id.clone(), ..todo("a", "b", DONE) };
            let rejected = ana.try_update_todo(Some(new), mask).await;
            assert_status(rejected, Code::Aborted, MISMATCH);
        }
    }
    assert_eq!(ana.get_todo(&second.id).await, second);
    let third = ana.update_todo(Todo { title: "third".into(), ..second }, Some(&["title"])).await;
    assert_eq!(third.title, "third");
}

#[tokio::test]
async fn an_etag_mismatch_rejects_a_deletion() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let first = ana.create_todo("first").await;
    let second = ana.update_todo(first.clone(), None).await;
    for etag in garbage(&second.etag).iter().chain([&first.etag]) {
        let rejected = ana.try_delete_todo(&second.id, etag).await;
        assert_status(rejected, Code::Aborted, MISMATCH);
    }
    assert_eq!(ana.get_todo(&second.id).await, second);
    ana.try_delete_todo(&second.id, &second.etag).await.expect("deleted");
    assert_status(ana.try_get_todo(&second.id).await, Code::NotFound, "TODO_NOT_FOUND");
}

#[tokio::test]
async fn a_missing_todo_is_not_found_whatever_the_etag() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let deleted = ana.create_todo("deleted").await;
    ana.try_delete_todo(&deleted.id, "").await.expect("deleted");
    for id in [deleted.id, Uuid::now_v7().to_string()] {
        for etag in ["", &deleted.etag, "x"] {
            let new = Todo { id: id.clone(), etag: etag.into(), ..todo_titled("new") };
            let rejected = ana.try_update_todo(Some(new), None).await;
            assert_status(rejected, Code::NotFound, "TODO_NOT_FOUND");
            let rejected = ana.try_delete_todo(&id, etag).await;
            assert_status(rejected, Code::NotFound, "TODO_NOT_FOUND");
        }
    }
}

/// Makes 32 concurrent updates, each with its own title.
async fn update_at_once(caller: &Client, todo: &Todo) -> Vec<RpcResult<UpdateTodoResponse>> {
    let update = |n: u32| {
        let (caller, new) = (caller.clone(), Todo { title: n.to_string(), ..todo.clone() });
        async move { caller.try_update_todo(Some(new), Some(&["title"])).await }
    };
    join_all((0..32).map(update)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_concurrent_updates_with_the_same_etag_succeeds() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo("old").await;
    let (won, lost): (Vec<_>, Vec<_>) =
        update_at_once(&ana, &old).await.into_iter().partition(Result::is_ok);
    assert_eq!((won.len(), lost.len()), (1, 31));
    for rejected in lost {
        assert_status(rejected, Code::Aborted, MISMATCH);
    }
    let won = won.into_iter().find_map(Result::ok).and_then(|won| won.into_inner().todo);
    assert_eq!(won, Some(ana.get_todo(&old.id).await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_updates_without_an_etag_all_succeed() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo("old").await;
    let unguarded = Todo { etag: String::new(), ..old.clone() };
    let version = |etag: String| etag.parse::<i64>().expect("a version");
    let mut versions = BTreeSet::from([version(old.etag)]);
    for response in update_at_once(&ana, &unguarded).await {
        let updated = response.expect("updated").into_inner().todo.expect("a todo");
        versions.insert(version(updated.etag));
    }
    assert_eq!(versions.len(), 33);
    let newest = versions.last().copied().expect("33 versions");
    assert_eq!(app.fetch_scalar::<i64>("select version from todos").await, newest);
    assert_eq!(app.fetch_scalar::<i64>("select version from todo_clocks").await, newest);
}
