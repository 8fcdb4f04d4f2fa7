//! The request messages of the benchmarks.

use fast_zero::proto::{
    todo::v1::{CreateTodoRequest, ListTodosRequest, Todo, TodoState, UpdateTodoRequest},
    user::v1::CreateUserRequest,
};
use prost_types::FieldMask;

use crate::seed::PAGE_SIZE;

/// The password of all users.
pub const PASSWORD: &str = "correct horse battery";

pub fn list_todos(title: &str, page_token: &str) -> ListTodosRequest {
    ListTodosRequest {
        title: title.to_owned(),
        page_token: page_token.to_owned(),
        page_size: PAGE_SIZE.cast_signed(),
        ..Default::default()
    }
}

pub fn create_todo() -> CreateTodoRequest {
    let todo = Todo {
        title: "Water the plants".to_owned(),
        description: "All of them, before it gets hot".to_owned(),
        state: TodoState::Todo.into(),
        ..Default::default()
    };
    CreateTodoRequest { todo: Some(todo) }
}

/// Returns an update of the todo's state only.
pub fn update_state(todo: Todo) -> UpdateTodoRequest {
    let update_mask = Some(FieldMask { paths: vec!["state".to_owned()] });
    UpdateTodoRequest { todo: Some(todo), update_mask }
}

pub fn create_user(username: &str) -> CreateUserRequest {
    CreateUserRequest {
        username: username.to_owned(),
        email: format!("{username}@example.com"),
        password: PASSWORD.to_owned(),
    }
}
