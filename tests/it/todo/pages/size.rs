//! Page sizes, in todos and in bytes.

use std::collections::BTreeSet;

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use prost::Message;

use super::insert;
use crate::support::{
    App,
    assert::assert_invalid,
    todos::{titles, todo_titled},
};

#[tokio::test]
async fn a_page_has_100_todos_unless_it_asks_for_up_to_1000() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert(&app, &ana, (0..1_001).map(|n| n.to_string()).collect(), "").await;
    for (page_size, count) in
        [(0, 100), (1, 1), (101, 101), (1_000, 1_000), (1_001, 1_000), (i32::MAX, 1_000)]
    {
        let page = ana.list_todos(ListTodosRequest { page_size, ..<_>::default() }).await;
        assert_eq!(page.todos.len(), count, "{page_size}");
        assert!(!page.next_page_token.is_empty());
    }
}

#[tokio::test]
async fn negative_sizes_and_skips_are_rejected() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (page_size, skip, invalid) in [
        (-1, 0, &["page_size"][..]),
        (0, -1, &["skip"]),
        (i32::MIN, i32::MIN, &["page_size", "skip"]),
    ] {
        let request = ListTodosRequest { page_size, skip, ..<_>::default() };
        assert_invalid(ana.try_list_todos(request).await, invalid);
    }
}

/// 200 characters of four bytes each.
fn widest_title(n: u32) -> String {
    let wide = char::from_u32(0x2_0000 + n).expect("a Chinese character");
    String::from(wide).repeat(200)
}

#[tokio::test]
async fn a_thousand_todos_are_listed_in_pages_below_1_mib_whatever_their_size() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for description in ["🦀".repeat(10_000), "a".repeat(500), "a".repeat(240), String::new()] {
        app.execute("delete from todos").await;
        insert(&app, &ana, (0..1_000).map(widest_title).collect(), &description).await;
        for order_by in ["create_time", "title desc"] {
            let order_by = order_by.to_owned();
            let request = ListTodosRequest { order_by, page_size: 1_000, ..<_>::default() };
            // The client has tonic's default limits.
            let pages = ana.list_todo_pages(request).await;
            for page in &pages {
                assert!(!page.todos.is_empty());
                assert!(page.encoded_len() < 1024 * 1024, "{}", page.encoded_len());
            }
            let todos: Vec<_> = pages.iter().flat_map(|page| &page.todos).collect();
            let distinct: BTreeSet<_> = todos.iter().map(|todo| &todo.id).collect();
            assert_eq!((todos.len(), distinct.len()), (1_000, 1_000));
            assert!(todos.iter().all(|todo| todo.description == description));
        }
    }
}

#[tokio::test]
async fn a_todo_of_maximum_size_can_be_created_and_listed_among_small_ones() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let full = Todo { description: "🦀".repeat(10_000), ..todo_titled(&widest_title(0)) };
    ana.create_todo("first").await;
    let full = ana.create_todo_with(full).await;
    ana.create_todo("last").await;
    for page_size in [1, 2, 0] {
        let todos = ana.list_all_todos(ListTodosRequest { page_size, ..<_>::default() }).await;
        assert_eq!(titles(&todos), ["first", &*full.title, "last"]);
    }
}
