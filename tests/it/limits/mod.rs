//! Admission control, quotas and limits of connections, calls and memory.

mod attacks;
mod calls;
mod connections;
mod constants;
mod flood;
mod memory;
mod messages;
mod owner_writes;
mod streams;

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{
    App, Client, RpcResult, assert::assert_status, http2::OTHER_CLIENT_IP, raw_client::RawClient,
    todos::todo_titled,
};

const CREATE: &str = "/fastzero.todo.v1.TodoService/CreateTodo";
const GET: &str = "/fastzero.todo.v1.TodoService/GetTodo";
const LIST: &str = "/fastzero.todo.v1.TodoService/ListTodos";
const UPDATE: &str = "/fastzero.todo.v1.TodoService/UpdateTodo";

/// Creates a user with a list of about 1 MiB.
async fn user_with_large_list(app: &App) -> Client {
    let ana = app.signed_up("ana").await;
    let description = "x".repeat(10_000);
    for _ in 0..110 {
        ana.create_todo_with(Todo { description: description.clone(), ..todo_titled("a") }).await;
    }
    ana
}

/// Returns the request for the whole list.
fn whole_list() -> ListTodosRequest {
    ListTodosRequest { page_size: 1000, ..ListTodosRequest::default() }
}

/// Connects the same caller from another address, with a flow-control window of 1 KiB for each
/// response.
async fn other_client(app: &App, caller: &Client) -> RawClient {
    let raw = RawClient::connect_from(OTHER_CLIENT_IP, app.address, 1024).await;
    raw.expect("connected").with_token_of(caller)
}

fn assert_overloaded<T>(rejected: RpcResult<T>) {
    let rejected = assert_status(rejected, Code::ResourceExhausted, "OVERLOADED");
    assert!(rejected.get_error_details().retry_info().is_some(), "{rejected:?}");
}
