//! The filters of lists.

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo, TodoState};

use crate::support::{
    App,
    assert::assert_invalid,
    todos::{titles, todo_titled},
};

/// Texts, each with filters that match it.
const CONTAINS: [(&str, &[&str]); 9] = [
    ("Ação", &["Ação", "AÇÃO", "ação", "c\u{327}a\u{303}", "ÇÃ", "A\u{303}o"]),
    ("É tarde", &["é", "É", "E\u{301}", "é t", " "]),
    ("Straße", &["STRASSE", "straße", "STRAẞE", "ss", "SS", "ẞ", "ß"]),
    ("ΟΔΟΣ", &["οδος", "οδοσ", "ΟΔΟΣ", "ς", "Σ"]),
    ("100% sure", &["%", "0% ", "100% SURE", " "]),
    ("snake_case", &["_", "E_C"]),
    (r"back\slash", &[r"\", r"K\S"]),
    ("'; drop table todos; --", &["'", "; DROP", "--", " "]),
    ("🦀 crab", &["🦀", "🦀 C", " "]),
];

#[tokio::test]
async fn filters_match_case_insensitively() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (text, _) in CONTAINS {
        ana.create_todo_with(Todo { description: text.to_owned(), ..todo_titled(text) }).await;
    }
    let needles = CONTAINS.iter().flat_map(|(_, needles)| *needles);
    for needle in needles.copied().chain(["x", "e\u{301}x", " %", "a%a", "a_a", r"\%", "  "]) {
        let finds =
            |(text, needles): &(&'static str, &[&str])| needles.contains(&needle).then_some(*text);
        let expected: Vec<_> = CONTAINS.iter().filter_map(finds).collect();
        let title = ListTodosRequest { title: needle.to_owned(), ..<_>::default() };
        let description = ListTodosRequest { description: needle.to_owned(), ..<_>::default() };
        for request in [title, description] {
            let page = ana.list_todos(request.clone()).await;
            let found = titles(&page.todos);
            assert_eq!(found, expected, "{request:?}");
        }
    }
}

#[tokio::test]
async fn filters_are_not_trimmed_and_have_up_to_100_characters() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo_with(Todo { description: "two\n\tlines".into(), ..todo_titled("a b") }).await;
    for (title, description, count) in [
        ("a ", "", 1),
        (" b", "", 1),
        ("b ", "", 0),
        (" a", "", 0),
        ("", "two\n\tlines", 1),
        ("", "two\r\n\tlines", 1),
        ("", "lines\n", 0),
        ("", "two lines", 0),
    ] {
        let request = ListTodosRequest {
            title: title.into(),
            description: description.into(),
            ..<_>::default()
        };
        assert_eq!(ana.list_todos(request.clone()).await.todos.len(), count, "{request:?}");
    }
    let filtered = |text: &str| {
        let (title, description) = (text.to_owned(), text.to_owned());
        ana.try_list_todos(ListTodosRequest { title, description, ..<_>::default() })
    };
    for valid in ["🦀".repeat(100), "e\u{301}".repeat(100), " ".repeat(100)] {
        filtered(&valid).await.expect("100 characters");
    }
    for invalid in ["🦀".repeat(101), " ".repeat(101), "a".repeat(1_000)] {
        assert_invalid(filtered(&invalid).await, &["title", "description"]);
    }
}

#[tokio::test]
async fn states_are_alternatives_and_all_filters_must_match() {
    use TodoState::{Doing, Done, Draft, Todo as ToBeDone, Trash};
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for state in [Draft, ToBeDone, Doing, Done, Trash] {
        for title in ["one", "two"] {
            let description = format!("{title} {}", state.as_str_name());
            ana.create_todo_with(Todo { description, state: state.into(), ..todo_titled(title) })
                .await;
        }
    }
    for (title, description, states, count) in [
        ("", "", &[][..], 10),
        ("", "", &[Trash], 2),
        ("", "", &[Draft, ToBeDone, Doing, Done, Trash], 10),
        ("", "", &[Done, Doing], 4),
        ("", "", &[Done, Done], 2),
        ("ONE", "", &[Done, Doing], 2),
        ("one", "two", &[Done, Doing], 0),
        ("two", "state_do", &[Draft, Done, Doing], 2),
        ("", "state_do", &[Draft], 0),
    ] {
        let request = ListTodosRequest {
            title: title.into(),
            description: description.into(),
            states: states.iter().map(|state| i32::from(*state)).collect(),
            ..<_>::default()
        };
        let found = ana.list_todos(request.clone()).await.todos;
        assert_eq!(found.len(), count, "{request:?}");
        assert!(found.iter().all(|todo| states.is_empty() || states.contains(&todo.state())));
    }
    for states in [vec![0], vec![1, 0], vec![6], vec![-1, 2], vec![i32::MAX]] {
        let request = ListTodosRequest { states, ..<_>::default() };
        assert_invalid(ana.try_list_todos(request).await, &["states"]);
    }
}

#[tokio::test]
async fn all_invalid_fields_of_a_list_are_reported() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let request = ListTodosRequest {
        title: "\0".into(),
        description: "\0".into(),
        states: vec![0],
        page_size: -1,
        page_token: "garbage".into(),
        skip: -1,
        order_by: "nothing".into(),
    };
    let all = ["title", "description", "states", "page_size", "page_token", "skip", "order_by"];
    assert_invalid(ana.try_list_todos(request).await, &all);
}
