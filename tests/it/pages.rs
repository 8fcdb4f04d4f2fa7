//! Lists of to-dos page by page.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
};

use fast_zero::{
    proto::{
        todo::v1::{ListTodosRequest, Todo, TodoState},
        user::v1::ListUsersRequest,
    },
    types::text,
};
use proptest::{
    prelude::*,
    sample::{select, subsequence},
    test_runner::TestRunner,
};
use prost::Message;
use tokio::runtime::Runtime;
use uuid::Uuid;

use crate::support::{
    App, Client,
    assert::assert_invalid,
    time::system_time,
    todos::{titled, titles},
};

const ORDERS: [&str; 6] =
    ["create_time", "create_time desc", "update_time", "update_time desc", "title", "title desc"];

fn ids(todos: &[Todo]) -> Vec<&str> {
    todos.iter().map(|todo| &*todo.id).collect()
}

/// Adds to-dos by SQL, all with the same time of change.
async fn insert(app: &App, owner: &Client, titles: Vec<String>, description: &str) {
    let owner = Uuid::parse_str(&owner.user_id()).expect("an id");
    let ids: Vec<_> = titles.iter().map(|_| Uuid::now_v7()).collect();
    let folded: Vec<_> = titles.iter().map(|title| text::fold(title)).collect();
    let insert = sqlx::query(
        "insert into todos (owner_id, id, title, title_folded, description, description_folded,
             state, updated_at, version)
         select $1, id, title, title_folded, $5, $5, 1, now(), 1
         from unnest($2::uuid[], $3::text[], $4::text[]) as new (id, title, title_folded)",
    );
    let insert = insert.bind(owner).bind(ids).bind(titles).bind(folded).bind(description);
    insert.execute(&mut app.sql().await).await.expect("inserted");
}

/// To-dos whose titles and times of change are often the same.
async fn insert_alike(app: &App, owner: &Client) {
    let titles = ["a", "A", "b", "a", "É", "é", "b", "A", "a", "C", "b", "c", "É", "a", "c"];
    insert(app, owner, titles.map(str::to_owned).to_vec(), "").await;
    app.execute("update todos set updated_at = updated_at + interval '1 s' where title > 'b'")
        .await;
}

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
async fn size_and_skip_are_not_negative() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (page_size, skip, bad) in [
        (-1, 0, &["page_size"][..]),
        (0, -1, &["skip"]),
        (i32::MIN, i32::MIN, &["page_size", "skip"]),
    ] {
        let request = ListTodosRequest { page_size, skip, ..<_>::default() };
        assert_invalid(ana.try_list_todos(request).await, bad);
    }
}

#[tokio::test]
async fn skip_leaves_out_further_todos_before_a_page() {
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
async fn pages_of_any_size_and_order_make_up_the_whole_list() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert_alike(&app, &ana).await;
    for order_by in ORDERS {
        let request = ListTodosRequest { order_by: order_by.to_owned(), ..<_>::default() };
        let whole = ana.list_todos(request.clone()).await;
        assert_eq!((whole.todos.len(), &*whole.next_page_token), (15, ""), "{order_by}");
        for page_size in [1, 2, 7, 14, 15] {
            let request = ListTodosRequest { page_size, ..request.clone() };
            let pages = ana.pages_of_todos(request).await;
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

/// The ids of the to-dos that stay, each as often as it was found.
fn staying(todos: &[Todo]) -> Vec<&str> {
    let mut staying: Vec<_> =
        todos.iter().filter(|todo| todo.title.ends_with("stays")).map(|todo| &*todo.id).collect();
    staying.sort_unstable();
    staying
}

async fn insert_staying_and_passing(app: &App, owner: &Client) {
    let titles = (0..10).flat_map(|n| [format!("{n} stays"), format!("{n} passes")]);
    insert(app, owner, titles.collect(), "").await;
}

#[tokio::test]
async fn what_stays_is_found_once_though_others_go_behind_each_page_and_come_anew() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for order_by in ORDERS {
        app.execute("delete from todos").await;
        insert_staying_and_passing(&app, &ana).await;
        let whole = ana.all_todos(ListTodosRequest::default()).await;
        let order_by = order_by.to_owned();
        let mut request = ListTodosRequest { order_by, page_size: 2, ..<_>::default() };
        let mut found = Vec::new();
        loop {
            let page = ana.list_todos(request.clone()).await;
            request.page_token = page.next_page_token;
            for passing in page.todos.iter().filter(|todo| todo.title.ends_with("passes")) {
                ana.try_delete_todo(&passing.id, "").await.expect("deleted");
            }
            found.extend(page.todos);
            if request.page_token.is_empty() {
                break;
            }
            // Before and after the place, but not without end.
            if found.len() < 30 {
                ana.create_todo("! passes").await;
                ana.create_todo("~ passes").await;
            }
        }
        assert_eq!(staying(&found), staying(&whole), "{}", request.order_by);
    }
}

#[tokio::test]
async fn what_stays_is_found_once_while_others_come_and_go() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    insert_staying_and_passing(&app, &ana).await;
    let whole = ana.all_todos(ListTodosRequest::default()).await;
    let done = AtomicBool::new(false);
    let walk = async {
        for order_by in ORDERS {
            let order_by = order_by.to_owned();
            let request = ListTodosRequest { order_by, page_size: 2, ..<_>::default() };
            let found = ana.all_todos(request.clone()).await;
            assert_eq!(staying(&found), staying(&whole), "{}", request.order_by);
        }
        done.store(true, Ordering::Relaxed);
    };
    let churn = async {
        let mut churned = 0;
        while !done.load(Ordering::Relaxed) {
            let passing = ana.create_todo(&format!("{} passes", churned % 30)).await;
            ana.try_delete_todo(&passing.id, "").await.expect("deleted");
            churned += 1;
        }
        assert!(churned > 0);
    };
    tokio::join!(walk, churn);
}

#[tokio::test]
async fn a_page_token_is_good_only_for_what_it_was_made_for() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for caller in [&ana, &bob] {
        insert_alike(&app, caller).await;
    }
    let request = ListTodosRequest {
        title: "a".into(),
        states: vec![TodoState::Draft.into()],
        order_by: "title".into(),
        page_size: 1,
        ..<_>::default()
    };
    let page_token = ana.list_todos(request.clone()).await.next_page_token;
    let request = ListTodosRequest { page_token, ..request };
    let of = |change: fn(&mut ListTodosRequest)| {
        let mut request = request.clone();
        change(&mut request);
        request
    };
    assert_invalid(bob.try_list_todos(request.clone()).await, &["page_token"]);
    for other in [
        of(|request| request.title = "b".into()),
        of(|request| request.title.clear()),
        of(|request| request.description = "a".into()),
        of(|request| (request.title, request.description) = (String::new(), "a".into())),
        of(|request| request.states = vec![TodoState::Draft.into(), TodoState::Done.into()]),
        of(|request| request.states.clear()),
        of(|request| request.order_by = "title desc".into()),
        of(|request| request.order_by = "update_time".into()),
        of(|request| request.order_by.clear()),
    ] {
        assert_invalid(ana.try_list_todos(other).await, &["page_token"]);
    }
    for same in [
        of(|_| ()),
        of(|request| request.page_size = 2),
        of(|request| request.page_size = 0),
        of(|request| request.skip = 1),
    ] {
        ana.try_list_todos(same).await.expect("it is what the token was made for");
    }
}

#[tokio::test]
async fn a_page_token_that_was_not_made_here_is_refused() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.create_user("bob").await;
    insert_alike(&app, &ana).await;
    let of_users = ListUsersRequest { page_size: 1, ..<_>::default() };
    let of_users = ana.users().list_users(of_users).await.expect("listed").into_inner();
    let page = ana.list_todos(ListTodosRequest { page_size: 1, ..<_>::default() }).await;
    let good = page.next_page_token;
    let turned: String = good.chars().rev().collect();
    let other_case: String =
        good.chars().map(|c| if c.is_lowercase() { c.to_ascii_uppercase() } else { c }).collect();
    for bad in [
        "x",
        "garbage!",
        "0",
        "🦀",
        "\0",
        " ",
        &good[1..],
        &good[..good.len() - 1],
        &good[..10],
        &format!("{good}A"),
        &format!("{good}="),
        &format!("{good} "),
        &good.repeat(2),
        &turned,
        &other_case,
        &"A".repeat(good.len()),
        &"A".repeat(10_000),
        &of_users.next_page_token,
    ] {
        let request = ListTodosRequest { page_token: bad.to_owned(), ..<_>::default() };
        assert_invalid(ana.try_list_todos(request).await, &["page_token"]);
    }
}

/// 200 characters of four bytes each.
fn widest_title(n: u32) -> String {
    let wide = char::from_u32(0x2_0000 + n).expect("a Chinese character");
    String::from(wide).repeat(200)
}

#[tokio::test]
async fn a_thousand_todos_come_in_pages_below_1_mib_whatever_their_size() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for description in ["🦀".repeat(10_000), "a".repeat(500), "a".repeat(240), String::new()] {
        app.execute("delete from todos").await;
        insert(&app, &ana, (0..1_000).map(widest_title).collect(), &description).await;
        for order_by in ["create_time", "title desc"] {
            let order_by = order_by.to_owned();
            let request = ListTodosRequest { order_by, page_size: 1_000, ..<_>::default() };
            // The client has tonic's default limits.
            let pages = ana.pages_of_todos(request).await;
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
async fn a_todo_of_full_size_can_be_added_and_listed_among_small_ones() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let full = Todo { description: "🦀".repeat(10_000), ..titled(&widest_title(0)) };
    ana.create_todo("first").await;
    let full = ana.create(full).await;
    ana.create_todo("last").await;
    for page_size in [1, 2, 0] {
        let todos = ana.all_todos(ListTodosRequest { page_size, ..<_>::default() }).await;
        assert_eq!(titles(&todos), ["first", &*full.title, "last"]);
    }
}

/// A list that a caller may ask for.
fn any_list() -> impl Strategy<Value = ListTodosRequest> {
    let needle = || select(vec!["", "a", "B", "ab", "É", "é a", "%", "_", " "]);
    let states = subsequence(vec![1, 2, 3, 4, 5], 0..=5);
    (needle(), needle(), states, select(&ORDERS[..]), 0..=8_i32, 0..=4_i32).prop_map(
        |(title, description, states, order_by, page_size, skip)| ListTodosRequest {
            title: title.into(),
            description: description.into(),
            states,
            order_by: order_by.into(),
            page_size,
            skip,
            page_token: String::new(),
        },
    )
}

/// What a list must hold, by the contract. For these texts, lower case is as good as
/// case folding.
fn model(todos: &[Todo], request: &ListTodosRequest) -> Vec<String> {
    let contains = |text: &str, part: &str| text.to_lowercase().contains(&part.to_lowercase());
    let fits = |todo: &&Todo| {
        contains(&todo.title, &request.title)
            && contains(&todo.description, &request.description)
            && (request.states.is_empty() || request.states.contains(&todo.state))
    };
    let mut todos: Vec<_> = todos.iter().filter(fits).collect();
    let (key, falling) = match request.order_by.split_once(' ') {
        Some((key, _)) => (key, true),
        None => (&*request.order_by, false),
    };
    let id = |todo: &Todo| todo.id.clone();
    match key {
        "create_time" => todos.sort_by_key(|todo| id(todo)),
        "update_time" => todos.sort_by_key(|todo| (system_time(todo.update_time), id(todo))),
        _ => todos.sort_by_key(|todo| (todo.title.to_lowercase(), todo.title.clone(), id(todo))),
    }
    if falling {
        todos.reverse();
    }
    let skip = usize::try_from(request.skip).expect("not negative");
    todos.into_iter().skip(skip).map(id).collect()
}

async fn insert_any(ana: &Client) -> Vec<Todo> {
    let texts = ["a", "A", "ab", "b a", "É A", "é", "100%", "a_b", "É", "c"];
    let mut todos = Vec::new();
    for n in 0..40 {
        let description = texts[n * 7 % 10].to_owned();
        let state = i32::try_from(n * 3 % 5 + 1).expect("small");
        todos.push(ana.create(Todo { description, state, ..titled(texts[n % 10]) }).await);
    }
    for index in [3, 30, 17, 8] {
        todos[index] = ana.update_todo(todos[index].clone(), None).await;
    }
    todos
}

#[test]
fn any_list_is_what_the_contract_says() {
    let runtime = Runtime::new().expect("a runtime");
    let (_app, ana, todos) = runtime.block_on(async {
        let app = App::start().await;
        let ana = app.signed_up("ana").await;
        let todos = insert_any(&ana).await;
        (app, ana, todos)
    });
    let config = ProptestConfig { cases: 100, failure_persistence: None, ..<_>::default() };
    let checked = TestRunner::new(config).run(&any_list(), |request| {
        let expected = model(&todos, &request);
        let listed = runtime.block_on(async {
            let first = ana.list_todos(request.clone()).await;
            let mut todos = first.todos;
            if !first.next_page_token.is_empty() {
                let page_token = first.next_page_token;
                let rest = ListTodosRequest { skip: 0, page_token, ..request };
                todos.extend(ana.all_todos(rest).await);
            }
            todos
        });
        prop_assert_eq!(ids(&listed), expected);
        Ok(())
    });
    checked.expect("the model agrees");
}
