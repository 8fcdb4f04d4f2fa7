//! A client of fast-zero: signs up, logs in, and creates, lists and updates todos.

use std::{process::ExitCode, sync::Arc};

use fast_zero_example::{
    Session, exit_code,
    proto::fastzero::todo::v1::{
        CreateTodoRequest, ListTodosRequest, Todo, TodoState, UpdateTodoRequest,
        todo_service_client::TodoServiceClient,
    },
    reason,
};
use tokio::try_join;
use tonic_types::StatusExt;
use tower::{BoxError, service_fn};

fn new_todo(title: &str) -> CreateTodoRequest {
    CreateTodoRequest { todo: Some(Todo { title: title.to_owned(), ..Todo::default() }) }
}

async fn run() -> Result<(), BoxError> {
    let session = Session::open().await?;
    let mut todos =
        TodoServiceClient::new(service_fn(move |request| Arc::clone(&session).call(request)));

    // Two concurrent calls: if the server rejects the access token, they refresh it once.
    let mut other = todos.clone();
    try_join!(
        todos.create_todo(new_todo("Buy milk")),
        other.create_todo(new_todo("Water the plants")),
    )?;
    let order_by = "create_time desc".to_owned();
    let newest = ListTodosRequest { order_by, page_size: 2, ..ListTodosRequest::default() };
    let page = todos.list_todos(newest).await?.into_inner();
    for todo in &page.todos {
        println!("todo: {}", todo.title);
    }

    // The update changes the etag, so repeating it with the first etag fails.
    let mut todo = page.todos[0].clone();
    todo.set_state(TodoState::Doing);
    let update = UpdateTodoRequest { todo: Some(todo), update_mask: None };
    todos.update_todo(update.clone()).await?;
    if let Err(status) = todos.update_todo(update).await {
        println!("stale etag: {}", reason(&status));
    }
    if let Err(status) = todos.create_todo(new_todo(" ")).await {
        let details = status.get_details_bad_request();
        for violation in details.into_iter().flat_map(|details| details.field_violations) {
            println!("invalid field: {}: {}", violation.field, violation.description);
        }
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    exit_code(run().await)
}
