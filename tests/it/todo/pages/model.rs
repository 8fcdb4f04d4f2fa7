//! Arbitrary lists, compared with a model.

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use proptest::{
    prelude::*,
    sample::{select, subsequence},
    test_runner::TestRunner,
};
use tokio::runtime::Runtime;

use super::{ORDERS, ids};
use crate::support::{App, Client, time::to_system_time, todos::todo_titled};

/// Generates a valid request for a list.
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

/// Returns the expected list according to the API. For these texts, lowercase equals case
/// folding.
fn model(todos: &[Todo], request: &ListTodosRequest) -> Vec<String> {
    let contains = |text: &str, part: &str| text.to_lowercase().contains(&part.to_lowercase());
    let fits = |todo: &&Todo| {
        contains(&todo.title, &request.title)
            && contains(&todo.description, &request.description)
            && (request.states.is_empty() || request.states.contains(&todo.state))
    };
    let mut todos: Vec<_> = todos.iter().filter(fits).collect();
    let (key, descending) = match request.order_by.split_once(' ') {
        Some((key, _)) => (key, true),
        None => (&*request.order_by, false),
    };
    let id = |todo: &Todo| todo.id.clone();
    match key {
        "create_time" => todos.sort_by_key(|todo| id(todo)),
        "update_time" => todos.sort_by_key(|todo| (to_system_time(todo.update_time), id(todo))),
        _ => todos.sort_by_key(|todo| (todo.title.to_lowercase(), todo.title.clone(), id(todo))),
    }
    if descending {
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
        todos.push(
            ana.create_todo_with(Todo { description, state, ..todo_titled(texts[n % 10]) }).await,
        );
    }
    for index in [3, 30, 17, 8] {
        todos[index] = ana.update_todo(todos[index].clone(), None).await;
    }
    todos
}

#[test]
fn any_list_matches_the_model() {
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
                todos.extend(ana.list_all_todos(rest).await);
            }
            todos
        });
        prop_assert_eq!(ids(&listed), expected);
        Ok(())
    });
    checked.expect("the model agrees");
}
