//! Consecutive pages of a list.

use std::sync::atomic::{AtomicBool, Ordering};

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};

use super::{ORDERS, ids, insert, insert_alike};
use crate::support::{App, Client, todos::titles};

#[tokio::test]
async fn skip_omits_todos_before_a_page() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert(&app, &ana, (0..8).map(|n| n.to_string()).collect(), "").await;
    let page = async |skip, page_token: &str| {
        let page_token = page_token.to_owned();
        ana.list_todos(ListTodosRequest { page_size: 2, skip, page_token, ..<_>::default() }).await
    };
    let first = page(1, "").await;
    assert_eq!(titles(&first.todos), ["1", "2"]);
    let second = page(2, &first.next_page_token).await;
    assert_eq!(titles(&second.todos), ["5", "6"]);
    let third = page(0, &second.next_page_token).await;
    assert_eq!((titles(&third.todos), &*third.next_page_token), (vec!["7"], ""));

    for (skip, token) in [(8, ""), (i32::MAX, ""), (1, &*second.next_page_token)] {
        let beyond = page(skip, token).await;
        assert_eq!((beyond.todos.len(), &*beyond.next_page_token), (0, ""), "{skip}");
    }
}

#[tokio::test]
async fn pages_of_any_size_and_order_form_the_whole_list() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert_alike(&app, &ana).await;
    for order_by in ORDERS {
        let request = ListTodosRequest { order_by: order_by.to_owned(), ..<_>::default() };
        let whole = ana.list_todos(request.clone()).await;
        assert_eq!((whole.todos.len(), &*whole.next_page_token), (15, ""), "{order_by}");
        for page_size in [1, 2, 7, 14, 15] {
            let request = ListTodosRequest { page_size, ..request.clone() };
            let pages = ana.list_todo_pages(request).await;
            let most = usize::try_from(page_size).expect("positive");
            assert!(pages.iter().all(|page| (1..=most).contains(&page.todos.len())));
            let todos: Vec<_> = pages.into_iter().flat_map(|page| page.todos).collect();
            assert_eq!(ids(&todos), ids(&whole.todos), "{order_by} by {page_size}");
        }
    }
}

#[tokio::test]
async fn the_size_may_change_from_page_to_page() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert_alike(&app, &ana).await;
    for order_by in ORDERS {
        let request = ListTodosRequest { order_by: order_by.to_owned(), ..<_>::default() };
        let whole = ana.list_todos(request.clone()).await.todos;
        let (mut found, mut page_token) = (Vec::new(), String::new());
        for page_size in [1, 4, 2, 1_000] {
            let request = ListTodosRequest { page_size, page_token, ..request.clone() };
            let page = ana.list_todos(request).await;
            found.extend(page.todos);
            page_token = page.next_page_token;
        }
        assert_eq!((ids(&found), &*page_token), (ids(&whole), ""), "{order_by}");
    }
}

/// Returns the ids of the remaining todos, each as often as it was listed.
fn remaining(todos: &[Todo]) -> Vec<&str> {
    let mut remaining: Vec<_> =
        todos.iter().filter(|todo| todo.title.ends_with("stays")).map(|todo| &*todo.id).collect();
    remaining.sort_unstable();
    remaining
}

async fn insert_remaining_and_temporary(app: &App, owner: &Client) {
    let titles = (0..10).flat_map(|n| [format!("{n} stays"), format!("{n} passes")]);
    insert(app, owner, titles.collect(), "").await;
}

#[tokio::test]
async fn remaining_todos_are_listed_once_if_others_are_deleted_and_created_behind_each_page() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for order_by in ORDERS {
        app.execute("delete from todos").await;
        insert_remaining_and_temporary(&app, &ana).await;
        let whole = ana.list_all_todos(ListTodosRequest::default()).await;
        let order_by = order_by.to_owned();
        let mut request = ListTodosRequest { order_by, page_size: 2, ..<_>::default() };
        let mut found = Vec::new();
        loop {
            let page = ana.list_todos(request.clone()).await;
            request.page_token = page.next_page_token;
            for temporary in page.todos.iter().filter(|todo| todo.title.ends_with("passes")) {
                ana.try_delete_todo(&temporary.id, "").await.expect("deleted");
            }
            found.extend(page.todos);
            if request.page_token.is_empty() {
                break;
            }
            // Todos before and after the cursor, but a limited number.
            if found.len() < 30 {
                ana.create_todo("! passes").await;
                ana.create_todo("~ passes").await;
            }
        }
        assert_eq!(remaining(&found), remaining(&whole), "{}", request.order_by);
    }
}

#[tokio::test]
async fn remaining_todos_are_listed_once_during_creations_and_deletions() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert_remaining_and_temporary(&app, &ana).await;
    let whole = ana.list_all_todos(ListTodosRequest::default()).await;
    let done = AtomicBool::new(false);
    let walk = async {
        for order_by in ORDERS {
            let order_by = order_by.to_owned();
            let request = ListTodosRequest { order_by, page_size: 2, ..<_>::default() };
            let found = ana.list_all_todos(request.clone()).await;
            assert_eq!(remaining(&found), remaining(&whole), "{}", request.order_by);
        }
        done.store(true, Ordering::Relaxed);
    };
    let create_and_delete = async {
        let mut deleted_count = 0;
        while !done.load(Ordering::Relaxed) {
            let temporary = ana.create_todo(&format!("{} passes", deleted_count % 30)).await;
            ana.try_delete_todo(&temporary.id, "").await.expect("deleted");
            deleted_count += 1;
        }
        assert!(deleted_count > 0);
    };
    tokio::join!(walk, create_and_delete);
}
