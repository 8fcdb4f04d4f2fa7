//! Admission control, quotas and limits of connections, calls and memory.

mod attacks;
mod calls;
mod connections;
mod constants;
mod flood;
mod memory;
mod messages;
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

/// Somebody with a list of a MiB.
async fn signed_up_with_much(app: &App) -> Client {
    let ana = app.signed_up("ana").await;
    let description = "x".repeat(10_000);
    for _ in 0..110 {
        ana.create_todo_with(Todo { description: description.clone(), ..todo_titled("a") }).await;
    }
    ana
}

/// The request for it.
fn all() -> ListTodosRequest {
    ListTodosRequest { page_size: 1000, ..ListTodosRequest::default() }
}

/// The same caller from another address, who reads a KiB of each answer.
async fn other_peer(app: &App, caller: &Client) -> RawClient {
    let wire = RawClient::connect_from(OTHER_CLIENT_IP, app.address, 1024).await;
    wire.expect("connected").with_token_of(caller)
}

fn assert_overloaded<T>(refused: RpcResult<T>) {
    let refused = assert_status(refused, Code::ResourceExhausted, "OVERLOADED");
    assert!(refused.get_error_details().retry_info().is_some(), "{refused:?}");
}
