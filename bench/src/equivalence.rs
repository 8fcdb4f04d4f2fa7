//! The check that all servers return the same responses, without which a comparison of
//! their cost means nothing.

use fast_zero::proto::todo::v1::{GetTodoRequest, Todo};

use crate::{
    client::Client, dataset::Dataset, error::Result, fixtures::Fixtures, launcher::Launcher,
    requests, seed::MATCHING_TITLE, server::Server,
};

/// Compares the responses of the service with those of all other servers. Ignores the IDs,
/// times and etags of new todos, and the content of page tokens.
pub async fn check_responses(launcher: &Launcher, dataset: &Dataset) -> Result<()> {
    let mut expected: Option<Vec<Todo>> = None;
    for target in launcher.servers() {
        let server = launcher.start(target, &dataset.database).await?;
        let responses = collect_responses(&server, dataset.fixtures_of(launcher, target)).await;
        let responses = responses.map_err(|error| format!("{target}: {error}"))?;
        server.stop().await?;
        let expected = expected.get_or_insert_with(|| responses.clone());
        if let Some((expected, actual)) = first_difference(expected, &responses) {
            return Err(format!("{target} returns {actual:?}, fast-zero {expected:?}").into());
        }
    }
    Ok(())
}

fn first_difference<'a>(expected: &'a [Todo], actual: &'a [Todo]) -> Option<(&'a Todo, &'a Todo)> {
    expected.iter().zip(actual).find(|(expected, actual)| expected != actual)
}

/// Makes the calls that a server must answer as the service does.
async fn collect_responses(server: &Server, fixtures: &Fixtures) -> Result<Vec<Todo>> {
    let todos = &mut Client::connect(&server.address).await?.todos;
    let caller = fixtures.caller(0);
    let required = |todo: Option<Todo>| todo.ok_or("the response has no todo");

    let request = GetTodoRequest { id: caller.todo_id(0) };
    let found = todos.get_todo(caller.authorized(request)).await?.into_inner().todo;
    let mut responses = vec![required(found)?];
    for (title, pages) in [("", 3), (MATCHING_TITLE, 1)] {
        let mut page_token = String::new();
        for _ in 0..pages {
            let request = caller.authorized(requests::list_todos(title, &page_token));
            let page = todos.list_todos(request).await?.into_inner();
            responses.extend(page.todos);
            // A marker for whether there is a next page. Page tokens differ.
            let has_next = i32::from(!page.next_page_token.is_empty());
            responses.push(Todo { state: has_next, ..Todo::default() });
            page_token = page.next_page_token;
        }
    }
    let created = todos.create_todo(caller.authorized(requests::create_todo())).await?;
    let created = required(created.into_inner().todo)?;
    // The other one of the states 2 and 3.
    let change = Todo { state: 5 - created.state, ..created.clone() };
    let request = caller.authorized(requests::update_state(change));
    let updated = required(todos.update_todo(request).await?.into_inner().todo)?;
    for todo in [created, updated] {
        let has_times = todo.create_time.is_some() && todo.update_time.is_some();
        responses.push(Todo {
            id: has_times.to_string(),
            create_time: None,
            update_time: None,
            etag: String::new(),
            ..todo
        });
    }
    Ok(responses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_different_todo_is_reported() {
        let todo = |title: &str| Todo { title: title.to_owned(), ..Todo::default() };
        let (expected, actual) = ([todo("a"), todo("b")], [todo("a"), todo("c")]);
        assert_eq!(first_difference(&expected, &expected), None);
        assert_eq!(first_difference(&expected, &actual), Some((&expected[1], &actual[1])));
    }
}
