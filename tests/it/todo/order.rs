//! The orders of lists.

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};

use crate::support::{
    App, Client,
    app::config,
    assert::assert_invalid,
    postgres::TestDatabase,
    todos::{titles, todo_titled},
};

async fn titles_by(caller: &Client, order_by: &str) -> Vec<String> {
    let request = ListTodosRequest { order_by: order_by.to_owned(), ..<_>::default() };
    caller.list_all_todos(request).await.into_iter().map(|todo| todo.title).collect()
}

#[tokio::test]
async fn a_list_has_one_of_six_orders() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let b = ana.create_todo("b").await;
    ana.create_todo("C").await;
    ana.create_todo("a").await;
    ana.update_todo(Todo { id: b.id, ..todo_titled("b") }, None).await;
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
    for invalid in [
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
        let request = ListTodosRequest { order_by: invalid.to_owned(), ..<_>::default() };
        assert_invalid(ana.try_list_todos(request).await, &["order_by"]);
    }
}

/// Titles that different locales order differently.
const TITLES: [&str; 24] = [
    "b", "B", "a", "A", "a b", "ab", "a-b", "A_B", "z", "Z", "é", "É", "e", "f", "_", "~", "1",
    "10", "2", "Ação", "AÇÃO", "acao", "🦀", "Ω",
];

/// Creates a database with each UTF-8 locale that this PostgreSQL supports.
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
    let available = available.fetch_all(&mut sql).await.expect("listed");
    let mut databases = vec![first];
    for locale in available {
        let options = format!("template template0 encoding 'UTF8' {locale}");
        databases.push(TestDatabase::create_empty(&options).await);
    }
    databases
}

#[tokio::test]
async fn titles_are_ordered_case_insensitively_then_by_code_point_in_any_collation() {
    // For these titles, lowercase equals case folding.
    let mut expected = TITLES.to_vec();
    expected.sort_by_key(|title| (title.to_lowercase(), *title));
    let descending: Vec<_> = expected.iter().rev().copied().collect();
    let databases = databases().await;
    assert!(databases.len() > 1, "there is always the collation C");
    for database in databases {
        let app = App::start_on(database, config()).await;
        let ana = app.signed_up("ana").await;
        for title in TITLES {
            ana.create_todo(title).await;
        }
        assert_eq!(titles_by(&ana, "title").await, expected);
        assert_eq!(titles_by(&ana, "title desc").await, descending);
        let request = ListTodosRequest { title: "ÇÃO".into(), ..<_>::default() };
        assert_eq!(titles(&ana.list_todos(request).await.todos), ["Ação", "AÇÃO"]);
    }
}
