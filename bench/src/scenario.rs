//! The measured calls.

use std::fmt;

use fast_zero::proto::todo::v1::{GetTodoRequest, Todo, TodoState};
use tonic::Status;

use crate::{
    client::Client,
    fixtures::{Caller, Fixtures},
    requests,
    seed::{MATCHING_TITLE, UNMATCHED_TITLE},
};

/// A kind of call, or a mix of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    Get,
    List,
    Filter,
    Create,
    Update,
    Mixed,
    Login,
    Refresh,
    SignUp,
    /// A page near the end of the long list.
    DeepPage,
    /// The first page of the long list.
    FirstPage,
    /// A substring filter that matches nothing in the long list.
    Contains,
    /// An update of a todo whose owner has watches. The number of the call selects the owner.
    Watched,
}

impl fmt::Display for Scenario {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Get => "GetTodo",
            Self::List => "ListTodos, 10 rows",
            Self::Filter => "ListTodos with a filter",
            Self::Create => "CreateTodo",
            Self::Update => "UpdateTodo",
            Self::Mixed => "80 % reads, 20 % writes",
            Self::Login => "Login",
            Self::Refresh => "RefreshToken",
            Self::SignUp => "CreateUser",
            Self::DeepPage => "ListTodos, deep page of the long list",
            Self::FirstPage => "ListTodos, first page of the long list",
            Self::Contains => "ListTodos, unmatched filter on the long list",
            Self::Watched => "UpdateTodo, with watches on two replicas",
        })
    }
}

impl Scenario {
    /// Returns `true` if the baseline implements the calls of this scenario.
    pub fn has_baseline(self) -> bool {
        use Scenario::{Create, Filter, Get, List, Mixed, Update};
        matches!(self, Get | List | Filter | Create | Update | Mixed)
    }

    /// Makes one call. The number selects the caller.
    pub async fn call(
        self,
        fixtures: &Fixtures,
        client: &mut Client,
        number: usize,
    ) -> Result<(), Status> {
        let caller = fixtures.caller(number);
        match self {
            Self::Get => get(client, fixtures, caller).await,
            Self::List => list(client, caller, "", "").await,
            Self::Filter => list(client, caller, MATCHING_TITLE, "").await,
            Self::Create => create(client, caller).await,
            Self::Update => update(client, fixtures, caller).await.map(drop),
            Self::Mixed => match fastrand::u8(0..10) {
                0..6 => get(client, fixtures, caller).await,
                6..8 => list(client, caller, "", "").await,
                8 => create(client, caller).await,
                _ => update(client, fixtures, caller).await.map(drop),
            },
            Self::Login => fixtures.log_in_other(client).await,
            Self::Refresh => caller.refresh(client).await,
            Self::SignUp => sign_up(client, fixtures).await,
            Self::DeepPage => {
                list(client, &fixtures.long_list_owner, "", &fixtures.deep_page_token).await
            }
            Self::FirstPage => list(client, &fixtures.long_list_owner, "", "").await,
            Self::Contains => list(client, &fixtures.long_list_owner, UNMATCHED_TITLE, "").await,
            Self::Watched => update(client, fixtures, fixtures.watched(number)).await.map(drop),
        }
    }
}

async fn get(client: &mut Client, fixtures: &Fixtures, caller: &Caller) -> Result<(), Status> {
    let request = GetTodoRequest { id: fixtures.random_todo_id(caller) };
    client.todos.get_todo(caller.authorized(request)).await.map(drop)
}

/// Lists todos. Returns an error if the page is empty although todos match the filter, or
/// the other way around.
async fn list(
    client: &mut Client,
    caller: &Caller,
    title: &str,
    page_token: &str,
) -> Result<(), Status> {
    let request = caller.authorized(requests::list_todos(title, page_token));
    let response = client.todos.list_todos(request).await?.into_inner();
    if response.todos.is_empty() != (title == UNMATCHED_TITLE) {
        return Err(Status::internal("unexpected number of todos in the page"));
    }
    Ok(())
}

async fn create(client: &mut Client, caller: &Caller) -> Result<(), Status> {
    client.todos.create_todo(caller.authorized(requests::create_todo())).await.map(drop)
}

/// Updates the state of a random todo of the caller, and returns the todo.
pub async fn update(
    client: &mut Client,
    fixtures: &Fixtures,
    caller: &Caller,
) -> Result<Todo, Status> {
    let state = fastrand::i32(TodoState::Draft as i32..=TodoState::Trash as i32);
    let todo = Todo { id: fixtures.random_todo_id(caller), state, ..Default::default() };
    let request = caller.authorized(requests::update_state(todo));
    let response = client.todos.update_todo(request).await?.into_inner();
    response.todo.ok_or_else(|| Status::internal("the response has no todo"))
}

async fn sign_up(client: &mut Client, fixtures: &Fixtures) -> Result<(), Status> {
    let request = requests::create_user(&fixtures.new_username());
    client.users.create_user(request).await.map(drop)
}
