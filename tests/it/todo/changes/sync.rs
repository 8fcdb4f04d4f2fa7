//! `SyncTodos`.

use fast_zero::proto::todo::v1::{SyncTodosRequest, Todo, TodoState};
use prost::Message;

use crate::support::{
    App,
    assert::assert_invalid,
    changes::{Copy, described},
};

fn after(cursor: &str, page_size: i32) -> SyncTodosRequest {
    SyncTodosRequest { cursor: cursor.to_owned(), page_size }
}

#[tokio::test]
async fn a_sync_returns_what_has_changed_since_its_cursor() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let empty = ana.sync_todos(after("", 0)).await;
    assert_eq!((empty.changes.len(), empty.caught_up, empty.full), (0, true, true));
    let (a, b) = (ana.create_todo("a").await, ana.create_todo("b").await);
    bob.create_todo("another owner's").await;
    let created = ana.sync_todos(after(&empty.cursor, 0)).await;
    assert_eq!(described(&created.changes), ["a", "b"]);
    assert_eq!((created.caught_up, created.full), (true, false));

    ana.update_todo(Todo { title: "a2".into(), ..a.clone() }, None).await;
    ana.delete_todo(&b.id).await;
    ana.update_todo(Todo { id: a.id.clone(), title: "a3".into(), ..<_>::default() }, None).await;
    let changed = ana.sync_todos(after(&created.cursor, 0)).await;
    assert_eq!(described(&changed.changes), ["-b", "a3"], "each todo once, in its last state");
    ana.undelete_todo(&b.id).await;
    let restored = ana.sync_todos(after(&changed.cursor, 0)).await;
    assert_eq!(described(&restored.changes), ["b"]);
    ana.purge_todo(&b.id).await;
    let purged = ana.sync_todos(after(&restored.cursor, 0)).await;
    assert_eq!(described(&purged.changes), ["-"], "a purged todo has no title");
    let none = ana.sync_todos(after(&purged.cursor, 0)).await;
    assert_eq!((none.changes.len(), none.caught_up), (0, true));
    // An old cursor is still valid.
    let again = ana.sync_todos(after(&empty.cursor, 0)).await;
    assert_eq!(described(&again.changes), ["a3", "-"]);
}

#[tokio::test]
async fn a_change_is_the_todo_as_other_methods_return_it() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = Todo {
        title: "Ação".into(),
        description: "two\nlines".into(),
        state: TodoState::Doing.into(),
        ..<_>::default()
    };
    let (kept, deleted) =
        (ana.create_todo_with(todo.clone()).await, ana.create_todo_with(todo).await);
    let deleted = ana.delete_todo(&deleted.id).await;
    let mut copy = Copy::default();
    copy.sync(&ana, 1).await;
    assert_eq!(copy.todos.values().collect::<Vec<_>>(), [&kept]);
    assert_eq!(copy.deleted.values().collect::<Vec<_>>(), [&deleted]);
}

#[tokio::test]
async fn a_full_sync_has_pages_and_ends_when_it_has_caught_up() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for number in 0..5 {
        ana.create_todo(&number.to_string()).await;
    }
    let first = ana.sync_todos(after("", 2)).await;
    assert_eq!(described(&first.changes), ["0", "1"]);
    assert_eq!((first.caught_up, first.full), (false, true));
    // A change while the sync runs comes at its end.
    let todos = ana.list_all_todos(<_>::default()).await;
    ana.update_todo(Todo { title: "0 again".into(), ..todos[0].clone() }, None).await;
    let second = ana.sync_todos(after(&first.cursor, 2)).await;
    assert_eq!(described(&second.changes), ["2", "3"]);
    assert_eq!((second.caught_up, second.full), (false, true));
    let last = ana.sync_todos(after(&second.cursor, 2)).await;
    assert_eq!(described(&last.changes), ["4", "0 again"]);
    assert_eq!((last.caught_up, last.full), (true, true));
    let next = ana.sync_todos(after(&last.cursor, 2)).await;
    assert_eq!((next.changes.len(), next.caught_up, next.full), (0, true, false));
}

/// Also a todo that was removed without a trace, because the client was away for too long.
#[tokio::test]
async fn a_full_sync_removes_what_it_does_not_contain() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (kept, _) = (ana.create_todo("kept").await, ana.create_todo("swept").await);
    let mut copy = Copy::default();
    copy.sync(&ana, 1).await;
    assert_eq!(copy.titles(), ["kept", "swept"]);
    app.execute("delete from todos where title = 'swept'").await;
    copy.sync(&ana, 1).await;
    assert_eq!(copy.titles(), ["kept", "swept"]);
    copy.cursor.clear();
    copy.sync(&ana, 1).await;
    assert_eq!(copy.todos.into_keys().collect::<Vec<_>>(), [kept.id]);
}

#[tokio::test]
async fn a_page_size_has_a_default_and_a_maximum() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "insert into todo_clocks select id, 2000 from users;
         insert into todos
         select id, gen_random_uuid(), 'a', 'a', '', '', 1, n from users, generate_series(1, 1500) n",
    )
    .await;
    for (page_size, changes) in [(0, 100), (7, 7), (1_000, 1_000), (i32::MAX, 1_000)] {
        assert_eq!(ana.sync_todos(after("", page_size)).await.changes.len(), changes);
    }
    assert_invalid(ana.try_sync_todos(after("", -1)).await, &["page_size"]);
    assert_invalid(ana.try_sync_todos(after("x", -1)).await, &["page_size", "cursor"]);
}

#[tokio::test]
async fn pages_of_changes_stay_below_1_mib() {
    const MAX_BYTES: usize = 1024 * 1024;
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "insert into todo_clocks select id, 4000000000000000 from users;
         insert into todos
         select id, gen_random_uuid(), 'a', 'a', repeat('🦀', 10000 * (n % 2)), '', 1,
             3000000000000000 + n
         from users, generate_series(1, 60) n;
         insert into todo_trash
         select id, gen_random_uuid(), repeat('🦀', 200), 'a', '', '', 1, 3000000000001000 + n
         from users, generate_series(1, 3000) n",
    )
    .await;
    let (mut cursor, mut changes, mut largest) = (String::new(), 0, 0);
    loop {
        let page = ana.sync_todos(after(&cursor, 1_000)).await;
        largest = largest.max(page.encoded_len());
        changes += page.changes.len();
        cursor = page.cursor;
        if page.caught_up {
            break;
        }
        assert!(!page.changes.is_empty());
    }
    assert_eq!(changes, 3_060);
    assert!((MAX_BYTES * 9 / 10..MAX_BYTES).contains(&largest), "{largest}");
}
