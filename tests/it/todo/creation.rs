//! Creating todos, and the rules for their fields.

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo, TodoState};
use prost_types::Timestamp;

use crate::support::{
    App,
    assert::assert_invalid,
    text::control_characters,
    time::{to_system_time, uuid_timestamp},
    todos::todo_titled,
};

fn described(description: &str) -> Todo {
    Todo { description: description.to_owned(), ..todo_titled("a") }
}

#[tokio::test]
async fn a_new_todo_is_a_draft_by_default() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let bare = ana.create_todo("buy milk").await;
    assert_eq!((&*bare.title, &*bare.description), ("buy milk", ""));
    assert_eq!(bare.state(), TodoState::Draft);
    assert!(!bare.etag.is_empty());

    for state in [TodoState::Todo, TodoState::Doing, TodoState::Done, TodoState::Trash] {
        let todo = Todo { state: state.into(), ..described("two litres") };
        let created = ana.create_todo_with(todo).await;
        assert_eq!((created.state(), &*created.description), (state, "two litres"));
        assert_eq!(ana.get_todo(&created.id).await, created);
    }
}

#[tokio::test]
async fn ids_are_ascending_and_contain_the_time_of_creation() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut last = String::new();
    for _ in 0..20 {
        let todo = ana.create_todo("a").await;
        assert!(todo.id > last, "{} after {last}", todo.id);
        assert_eq!(todo.create_time, Some(uuid_timestamp(&todo.id)));
        assert!(to_system_time(todo.update_time) >= to_system_time(todo.create_time));
        last = todo.id;
    }
}

#[tokio::test]
async fn read_only_fields_of_a_new_todo_are_ignored() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let other = ana.create_todo("other").await;
    for id in [&*other.id, "no id"] {
        let epoch = Some(Timestamp::default());
        let etag = "no etag".to_owned();
        let todo = Todo {
            id: id.into(),
            create_time: epoch,
            update_time: epoch,
            etag,
            ..todo_titled("a")
        };
        let created = ana.create_todo_with(todo).await;
        assert_ne!(created.id, id);
        assert_eq!(created.create_time, Some(uuid_timestamp(&created.id)));
        assert!(to_system_time(created.update_time) >= to_system_time(created.create_time));
        assert_ne!(created.etag, "no etag");
    }
    assert_eq!(ana.get_todo(&other.id).await, other);
}

#[tokio::test]
async fn all_invalid_fields_of_a_new_todo_are_reported() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    assert_invalid(ana.try_create_todo(None).await, &["todo"]);
    let all_bad = Todo { description: "\0".into(), state: 99, ..todo_titled("") };
    let rejected = ana.try_create_todo(Some(all_bad)).await;
    assert_invalid(rejected, &["todo.title", "todo.description", "todo.state"]);
    for state in [-1, 6, 65_537, i32::MAX, i32::MIN] {
        let rejected = ana.try_create_todo(Some(Todo { state, ..todo_titled("a") })).await;
        assert_invalid(rejected, &["todo.state"]);
    }
}

#[tokio::test]
async fn titles_are_normalized_trimmed_and_then_measured_in_characters() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (raw, stored) in [
        ("a".to_owned(), "a".to_owned()),
        (" \u{3000}a  b\u{a0}\u{2003}".into(), "a  b".into()),
        ("e\u{301}".into(), "\u{e9}".into()),
        ("a".repeat(200), "a".repeat(200)),
        ("🦀".repeat(200), "🦀".repeat(200)),
        (format!("  {}  ", "🦀".repeat(200)), "🦀".repeat(200)),
        // 400 characters become 200.
        ("e\u{301}".repeat(200), "\u{e9}".repeat(200)),
        // One character becomes three.
        ("\u{1d160}".repeat(66), "\u{1d158}\u{1d165}\u{1d16e}".repeat(66)),
    ] {
        assert_eq!(ana.create_todo(&raw).await.title, stored);
    }
    for raw in [
        String::new(),
        "   ".into(),
        "\u{3000}\u{a0}".into(),
        "a".repeat(201),
        "🦀".repeat(201),
        "\u{1d160}".repeat(67),
    ] {
        let rejected = ana.try_create_todo(Some(todo_titled(&raw))).await;
        assert_invalid(rejected, &["todo.title"]);
    }
}

#[tokio::test]
async fn descriptions_are_normalized_trimmed_and_then_measured_in_characters() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (raw, stored) in [
        (String::new(), String::new()),
        (" \n\t ".into(), String::new()),
        ("\n a\tb\n\nc \n".into(), "a\tb\n\nc".into()),
        ("a\r\nb\r\n".into(), "a\nb".into()),
        ("🦀".repeat(10_000), "🦀".repeat(10_000)),
        (format!("a{}b", "\r\n".repeat(9_998)), format!("a{}b", "\n".repeat(9_998))),
        ("e\u{301}".repeat(10_000), "\u{e9}".repeat(10_000)),
    ] {
        let created = ana.create_todo_with(described(&raw)).await;
        assert_eq!(created.description, stored);
    }
    for raw in ["🦀".repeat(10_001), format!("a{}b", "\n".repeat(9_999))] {
        let rejected = ana.try_create_todo(Some(described(&raw))).await;
        assert_invalid(rejected, &["todo.description"]);
    }
}

#[tokio::test]
async fn control_characters_are_rejected_even_where_trimming_would_remove_them() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for control in control_characters() {
        let (text, in_lines) = (format!("a{control}"), matches!(control, '\n' | '\t'));
        let invalid: &[&str] =
            if in_lines { &["todo.title"] } else { &["todo.title", "todo.description"] };
        let todo = Todo { description: text.clone(), ..todo_titled(&text) };
        assert_invalid(ana.try_create_todo(Some(todo)).await, invalid);

        let invalid: &[&str] = if in_lines { &["title"] } else { &["title", "description"] };
        let list = ListTodosRequest { title: text.clone(), description: text, ..<_>::default() };
        assert_invalid(ana.try_list_todos(list).await, invalid);
    }
    // A carriage return is part of a line break or nothing.
    for text in ["a\rb", "a\n\rb", "a\r\r\nb"] {
        let rejected = ana.try_create_todo(Some(described(text))).await;
        assert_invalid(rejected, &["todo.description"]);
    }
}
