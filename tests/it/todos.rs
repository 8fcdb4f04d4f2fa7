//! To-dos one by one, and which of them a list holds in which order.

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo, TodoState};
use prost_types::Timestamp;
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    App, Client,
    app::{config, keyring},
    assert::{assert_invalid, assert_refused},
    postgres::TestDatabase,
    text::control_characters,
    time::{system_time, time_in},
    todos::{titled, titles, without_message},
};

fn described(description: &str) -> Todo {
    Todo { description: description.to_owned(), ..titled("a") }
}

#[tokio::test]
async fn a_new_todo_is_a_draft_unless_it_says_otherwise() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let bare = ana.create_todo("buy milk").await;
    assert_eq!((&*bare.title, &*bare.description), ("buy milk", ""));
    assert_eq!(bare.state(), TodoState::Draft);
    assert!(!bare.etag.is_empty());

    for state in [TodoState::Todo, TodoState::Doing, TodoState::Done, TodoState::Trash] {
        let todo = Todo { state: state.into(), ..described("two litres") };
        let created = ana.create(todo).await;
        assert_eq!((created.state(), &*created.description), (state, "two litres"));
        assert_eq!(ana.get_todo(&created.id).await, created);
    }
}

#[tokio::test]
async fn ids_rise_and_hold_the_time_of_creation() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut last = String::new();
    for _ in 0..20 {
        let todo = ana.create_todo("a").await;
        assert!(todo.id > last, "{} after {last}", todo.id);
        assert_eq!(todo.create_time, Some(time_in(&todo.id)));
        assert!(system_time(todo.update_time) >= system_time(todo.create_time));
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
        let todo =
            Todo { id: id.into(), create_time: epoch, update_time: epoch, etag, ..titled("a") };
        let created = ana.create(todo).await;
        assert_ne!(created.id, id);
        assert_eq!(created.create_time, Some(time_in(&created.id)));
        assert!(system_time(created.update_time) >= system_time(created.create_time));
        assert_ne!(created.etag, "no etag");
    }
    assert_eq!(ana.get_todo(&other.id).await, other);
}

#[tokio::test]
async fn every_bad_field_of_a_new_todo_is_named_at_once() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    assert_invalid(ana.try_create_todo(None).await, &["todo"]);
    let all_bad = Todo { description: "\0".into(), state: 99, ..titled("") };
    let refused = ana.try_create_todo(Some(all_bad)).await;
    assert_invalid(refused, &["todo.title", "todo.description", "todo.state"]);
    for state in [-1, 6, 65_537, i32::MAX, i32::MIN] {
        let refused = ana.try_create_todo(Some(Todo { state, ..titled("a") })).await;
        assert_invalid(refused, &["todo.state"]);
    }
}

#[tokio::test]
async fn titles_are_normalised_trimmed_and_then_measured_in_characters() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (raw, kept) in [
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
        assert_eq!(ana.create_todo(&raw).await.title, kept);
    }
    for raw in [
        String::new(),
        "   ".into(),
        "\u{3000}\u{a0}".into(),
        "a".repeat(201),
        "🦀".repeat(201),
        "\u{1d160}".repeat(67),
    ] {
        let refused = ana.try_create_todo(Some(titled(&raw))).await;
        assert_invalid(refused, &["todo.title"]);
    }
}

#[tokio::test]
async fn descriptions_are_normalised_trimmed_and_then_measured_in_characters() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (raw, kept) in [
        (String::new(), String::new()),
        (" \n\t ".into(), String::new()),
        ("\n a\tb\n\nc \n".into(), "a\tb\n\nc".into()),
        ("a\r\nb\r\n".into(), "a\nb".into()),
        ("🦀".repeat(10_000), "🦀".repeat(10_000)),
        (format!("a{}b", "\r\n".repeat(9_998)), format!("a{}b", "\n".repeat(9_998))),
        ("e\u{301}".repeat(10_000), "\u{e9}".repeat(10_000)),
    ] {
        let created = ana.create(described(&raw)).await;
        assert_eq!(created.description, kept);
    }
    for raw in ["🦀".repeat(10_001), format!("a{}b", "\n".repeat(9_999))] {
        let refused = ana.try_create_todo(Some(described(&raw))).await;
        assert_invalid(refused, &["todo.description"]);
    }
}

#[tokio::test]
async fn control_characters_are_refused_even_where_trimming_would_cut_them() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for control in control_characters() {
        let (text, in_lines) = (format!("a{control}"), matches!(control, '\n' | '\t'));
        let bad: &[&str] =
            if in_lines { &["todo.title"] } else { &["todo.title", "todo.description"] };
        let todo = Todo { description: text.clone(), ..titled(&text) };
        assert_invalid(ana.try_create_todo(Some(todo)).await, bad);

        let bad: &[&str] = if in_lines { &["title"] } else { &["title", "description"] };
        let list = ListTodosRequest { title: text.clone(), description: text, ..<_>::default() };
        assert_invalid(ana.try_list_todos(list).await, bad);
    }
    // A carriage return is part of a line break or nothing.
    for text in ["a\rb", "a\n\rb", "a\r\r\nb"] {
        let refused = ana.try_create_todo(Some(described(text))).await;
        assert_invalid(refused, &["todo.description"]);
    }
}

#[tokio::test]
async fn a_deleted_todo_is_gone_for_good() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (gone, kept) = (ana.create_todo("gone").await, ana.create_todo("kept").await);
    ana.try_delete_todo(&gone.id, "").await.expect("deleted");

    assert_refused(ana.try_get_todo(&gone.id).await, Code::NotFound, "TODO_NOT_FOUND");
    assert_refused(ana.try_delete_todo(&gone.id, "").await, Code::NotFound, "TODO_NOT_FOUND");
    assert_eq!(ana.list_todos(ListTodosRequest::default()).await.todos, [kept]);
    assert_eq!(app.select::<i64>("select count(*) from todos").await, 1);
}

#[tokio::test]
async fn another_users_todo_is_like_one_that_never_was() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let todo = ana.create_todo("ana's").await;
    let never = Todo { id: Uuid::now_v7().to_string(), ..todo.clone() };
    for Todo { id, etag, .. } in [&todo, &never] {
        let update = |etag: &str| Todo { id: id.clone(), etag: etag.to_owned(), ..todo.clone() };
        for refused in [
            bob.try_get_todo(id).await.map(without_message),
            bob.try_update_todo(Some(update("")), None).await.map(without_message),
            bob.try_update_todo(Some(update(etag)), None).await.map(without_message),
            bob.try_update_todo(Some(update("x")), Some(&["*"])).await.map(without_message),
            bob.try_delete_todo(id, "").await.map(without_message),
            bob.try_delete_todo(id, etag).await.map(without_message),
            bob.try_delete_todo(id, "x").await.map(without_message),
        ] {
            let status = assert_refused(refused, Code::NotFound, "TODO_NOT_FOUND");
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
    for bad in [
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
        assert_invalid(ana.try_get_todo(bad).await, &["id"]);
        assert_invalid(ana.try_delete_todo(bad, "").await, &["id"]);
        let todo = Todo { id: bad.to_owned(), ..titled("b") };
        assert_invalid(ana.try_update_todo(Some(todo), None).await, &["todo.id"]);
    }
    assert_eq!(ana.get_todo(&id).await.title, "a");
}

/// Text, and what finds it.
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
async fn a_list_holds_what_contains_the_text_without_regard_to_case() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (text, _) in CONTAINS {
        ana.create(Todo { description: text.to_owned(), ..titled(text) }).await;
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
    ana.create(Todo { description: "two\n\tlines".into(), ..titled("a b") }).await;
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
    for good in ["🦀".repeat(100), "e\u{301}".repeat(100), " ".repeat(100)] {
        filtered(&good).await.expect("100 characters");
    }
    for bad in ["🦀".repeat(101), " ".repeat(101), "a".repeat(1_000)] {
        assert_invalid(filtered(&bad).await, &["title", "description"]);
    }
}

#[tokio::test]
async fn states_are_alternatives_and_filters_must_all_fit() {
    use TodoState::{Doing, Done, Draft, Todo as ToBeDone, Trash};
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for state in [Draft, ToBeDone, Doing, Done, Trash] {
        for title in ["one", "two"] {
            let description = format!("{title} {}", state.as_str_name());
            ana.create(Todo { description, state: state.into(), ..titled(title) }).await;
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
async fn every_bad_field_of_a_list_is_named_at_once() {
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

async fn titles_by(caller: &Client, order_by: &str) -> Vec<String> {
    let request = ListTodosRequest { order_by: order_by.to_owned(), ..<_>::default() };
    caller.all_todos(request).await.into_iter().map(|todo| todo.title).collect()
}

#[tokio::test]
async fn a_list_has_one_of_six_orders() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let b = ana.create_todo("b").await;
    ana.create_todo("C").await;
    ana.create_todo("a").await;
    ana.update_todo(Todo { id: b.id, ..titled("b") }, None).await;
    for (order_by, expected) in [
        ("", ["b", "C", "a"]),
        ("create_time", ["b", "C", "a"]),
        ("create_time desc", ["a", "C", "b"]),
        ("update_time", ["C", "a", "b"]),
        ("update_time desc", ["b", "a", "C"]),
        ("title", ["a", "b", "C"]),
        ("title desc", ["C", "b", "a"]),
    ] {
        assert_eq!(titles_by(&ana, order_by).await, expected, "{order_by}");
    }
    for bad in [
        "id",
        "desc",
        "Title",
        "title asc",
        "title DESC",
        "titledesc",
        "title desc desc",
        "title,create_time",
        "state",
        "description",
        "title; drop table todos",
        "title\0",
    ] {
        let request = ListTodosRequest { order_by: bad.to_owned(), ..<_>::default() };
        assert_invalid(ana.try_list_todos(request).await, &["order_by"]);
    }
}

/// Titles that locales order differently from each other.
const TITLES: [&str; 24] = [
    "b", "B", "a", "A", "a b", "ab", "a-b", "A_B", "z", "Z", "é", "É", "e", "f", "_", "~", "1",
    "10", "2", "Ação", "AÇÃO", "acao", "🦀", "Ω",
];

/// All kinds of databases that this PostgreSQL can make and that hold UTF-8.
async fn databases() -> Vec<TestDatabase> {
    let first = TestDatabase::create().await;
    let mut sql = first.connect().await;
    let available = sqlx::query_scalar::<_, String>(
        "select case when collprovider = 'i' then 'locale_provider icu icu_locale ''en-US'' locale ''C'''
            when current_setting('server_version_num')::int < 150000
                then format('locale %L', collname)
            else format('locale_provider libc locale %L', collname) end
         from pg_collation
         where collprovider = 'c' and collname in ('C', 'C.utf8', 'en_US.utf8', 'pt_BR.utf8')
             or collprovider = 'i' and collname = 'en-US-x-icu'
                 and current_setting('server_version_num')::int >= 150000",
    );
    let available = available.fetch_all(&mut sql).await.expect("looked");
    let mut databases = vec![first];
    for locale in available {
        let options = format!("template template0 encoding 'UTF8' {locale}");
        databases.push(TestDatabase::create_empty(&options).await);
    }
    databases
}

#[tokio::test]
async fn titles_are_ordered_without_case_then_by_code_point_whatever_the_collation() {
    // For these titles, lower case is as good as case folding.
    let mut expected = TITLES.to_vec();
    expected.sort_by_key(|title| (title.to_lowercase(), *title));
    let falling: Vec<_> = expected.iter().rev().copied().collect();
    let databases = databases().await;
    assert!(databases.len() > 1, "there is always the collation C");
    for database in databases {
        let app = App::start_on(database, config(), keyring()).await;
        let ana = app.signed_up("ana").await;
        for title in TITLES {
            ana.create_todo(title).await;
        }
        assert_eq!(titles_by(&ana, "title").await, expected);
        assert_eq!(titles_by(&ana, "title desc").await, falling);
        let request = ListTodosRequest { title: "ÇÃO".into(), ..<_>::default() };
        assert_eq!(titles(&ana.list_todos(request).await.todos), ["Ação", "AÇÃO"]);
    }
}
