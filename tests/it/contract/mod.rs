//! Rules that apply to every RPC.

mod access;
mod compression;
mod deadlines;
mod documentation;
mod errors;
mod fuzz;
mod health;
mod messages;
mod precedence;
mod protocol;
mod reflection;
mod request_ids;

use fast_zero::proto::todo::v1::{Todo, UpdateTodoRequest};
use prost::Message;

const GET_TODO: &str = "/fastzero.todo.v1.TodoService/GetTodo";
const LIST_TODOS: &str = "/fastzero.todo.v1.TodoService/ListTodos";
const CREATE_TODO: &str = "/fastzero.todo.v1.TodoService/CreateTodo";
const UPDATE_TODO: &str = "/fastzero.todo.v1.TodoService/UpdateTodo";

/// A valid id that does not exist.
const NO_ID: &str = "01890000-0000-7000-8000-000000000000";

fn update_of(todo: Todo) -> Vec<u8> {
    UpdateTodoRequest { todo: Some(todo), update_mask: None }.encode_to_vec()
}
