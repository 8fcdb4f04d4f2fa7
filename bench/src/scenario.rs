//! The calls that are measured.

use std::{
    fmt,
    sync::atomic::{AtomicU32, Ordering},
};

use fast_zero::proto::{
    auth::v1::{LoginRequest, RefreshTokenRequest, TokenSet},
    todo::v1::{
        CreateTodoRequest, GetTodoRequest, ListTodosRequest, Todo, TodoState, UpdateTodoRequest,
    },
    user::v1::CreateUserRequest,
};
use prost_types::FieldMask;
use tokio::sync::Mutex;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
};

use crate::{
    Result,
    client::Client,
    fill::{self, Fill},
};

/// The password of all users.
pub const PASSWORD: &str = "correct horse battery";

/// Rows of a page.
pub const PAGE_SIZE: i32 = 10;

/// Users who call. Each has one session for the whole run.
pub const CALLERS: u32 = 64;

/// What is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
    /// A page far into a long list, and the first page of the same list.
    LatePage,
    FirstPage,
    /// A search in a long list that finds nothing.
    Contains,
}

impl fmt::Display for Scenario {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Get => "GetTodo",
            Self::List => "ListTodos, 10 rows",
            Self::Filter => "ListTodos with a filter",
            Self::Create => "CreateTodo",
            Self::Update => "UpdateTodo",
            Self::Mixed => "80 % reads, 20 % writes",
            Self::Login => "Login",
            Self::Refresh => "RefreshToken",
            Self::SignUp => "CreateUser",
            Self::LatePage => "ListTodos, a late page",
            Self::FirstPage => "ListTodos, page 1 of a long list",
            Self::Contains => "ListTodos, contains, in a long list",
        })
    }
}

/// Somebody who is logged in.
struct Caller {
    user: u32,
    bearer: MetadataValue<Ascii>,
    /// Good once: who refreshes holds it until the next one is there.
    refresh_token: Mutex<String>,
}

/// What callers know.
pub struct World {
    fill: Fill,
    /// The one with many to-dos.
    collector: Caller,
    callers: Vec<Caller>,
    /// Of a late page of the collector's.
    late_page: String,
    signed_up: AtomicU32,
}

impl World {
    /// Logs the callers in.
    pub async fn enter(client: &mut Client, fill: Fill) -> Result<Self> {
        let mut callers = Vec::new();
        for user in 1..=CALLERS {
            callers.push(Caller::log_in(client, user).await?);
        }
        let collector = Caller::log_in(client, 0).await?;
        Ok(Self {
            fill,
            collector,
            callers,
            late_page: String::new(),
            signed_up: AtomicU32::new(0),
        })
    }

    /// Walks through the long list, up to where this page begins, counted from 1.
    pub async fn walk_to(&mut self, client: &mut Client, page: u32) -> Result<()> {
        let mut token = String::new();
        for _ in 1..page {
            let request =
                ListTodosRequest { page_size: PAGE_SIZE, page_token: token, ..Default::default() };
            let listed = client.todos.list_todos(self.collector.says(request)).await?;
            token = listed.into_inner().next_page_token;
            if token.is_empty() {
                return Err("the list is too short".into());
            }
        }
        self.late_page = token;
        Ok(())
    }

    /// Makes one call. The number chooses the caller where that matters.
    pub async fn call(
        &self,
        scenario: Scenario,
        client: &mut Client,
        number: usize,
    ) -> Result<(), Status> {
        let caller = &self.callers[number % self.callers.len()];
        match scenario {
            Scenario::Get => self.get(client, caller).await,
            Scenario::List => list(client, caller, "", "").await,
            Scenario::Filter => list(client, caller, fill::RARE, "").await,
            Scenario::Create => create(client, caller).await,
            Scenario::Update => self.update(client, caller).await,
            Scenario::Mixed => match fastrand::u8(0..10) {
                0..6 => self.get(client, caller).await,
                6..8 => list(client, caller, "", "").await,
                8 => create(client, caller).await,
                _ => self.update(client, caller).await,
            },
            Scenario::Login => {
                // Not the callers: a login ends the oldest of many sessions.
                let user = fastrand::u32(CALLERS + 1..self.fill.users);
                log_in(client, user).await.map(drop)
            }
            Scenario::Refresh => caller.refresh(client).await,
            Scenario::SignUp => self.sign_up(client).await,
            Scenario::LatePage => list(client, &self.collector, "", &self.late_page).await,
            Scenario::FirstPage => list(client, &self.collector, "", "").await,
            Scenario::Contains => list(client, &self.collector, fill::NEVER, "").await,
        }
    }

    /// The id of one of a caller's to-dos.
    fn any_todo(&self, caller: &Caller) -> String {
        fill::todo_id(caller.user, fastrand::u32(..self.fill.each())).to_string()
    }

    async fn get(&self, client: &mut Client, caller: &Caller) -> Result<(), Status> {
        let request = GetTodoRequest { id: self.any_todo(caller) };
        client.todos.get_todo(caller.says(request)).await.map(drop)
    }

    async fn update(&self, client: &mut Client, caller: &Caller) -> Result<(), Status> {
        let state = fastrand::i32(TodoState::Draft as i32..=TodoState::Trash as i32);
        let todo = Todo { id: self.any_todo(caller), state, ..Default::default() };
        client.todos.update_todo(caller.says(update_of_state(todo))).await.map(drop)
    }

    async fn sign_up(&self, client: &mut Client) -> Result<(), Status> {
        let number = self.signed_up.fetch_add(1, Ordering::Relaxed);
        client.users.create_user(new_user(&format!("new{number}"))).await.map(drop)
    }

    /// The same requests, for the answers to be compared: a look-up, a list and its filter.
    pub fn todo_of_first_caller(&self) -> String {
        fill::todo_id(self.callers[0].user, 0).to_string()
    }

    /// A message, said by the first caller.
    pub fn first_caller_says<T>(&self, message: T) -> Request<T> {
        self.callers[0].says(message)
    }
}

impl Caller {
    async fn log_in(client: &mut Client, user: u32) -> Result<Self> {
        let tokens = log_in(client, user).await?;
        Ok(Self {
            user,
            bearer: format!("Bearer {}", tokens.access_token).parse()?,
            refresh_token: Mutex::new(tokens.refresh_token),
        })
    }

    fn says<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.bearer.clone());
        request
    }

    async fn refresh(&self, client: &mut Client) -> Result<(), Status> {
        let mut token = self.refresh_token.lock().await;
        let request = RefreshTokenRequest { refresh_token: token.clone() };
        let tokens = client.auth.refresh_token(request).await?.into_inner().tokens;
        *token = tokens.unwrap_or_default().refresh_token;
        Ok(())
    }
}

async fn log_in(client: &mut Client, user: u32) -> Result<TokenSet, Status> {
    let (login, password) = (fill::username(user), PASSWORD.to_owned());
    let response = client.auth.login(LoginRequest { login, password }).await?;
    Ok(response.into_inner().tokens.unwrap_or_default())
}

/// A list that must not be empty, except where nothing is to be found.
async fn list(
    client: &mut Client,
    caller: &Caller,
    title: &str,
    page_token: &str,
) -> Result<(), Status> {
    let listed =
        client.todos.list_todos(caller.says(list_of(title, page_token))).await?.into_inner();
    if listed.todos.is_empty() != (title == fill::NEVER) {
        return Err(Status::internal("the list has not what it should have"));
    }
    Ok(())
}

async fn create(client: &mut Client, caller: &Caller) -> Result<(), Status> {
    client.todos.create_todo(caller.says(new_todo())).await.map(drop)
}

/// A page of to-dos.
pub fn list_of(title: &str, page_token: &str) -> ListTodosRequest {
    ListTodosRequest {
        title: title.to_owned(),
        page_token: page_token.to_owned(),
        page_size: PAGE_SIZE,
        ..Default::default()
    }
}

/// A new to-do.
pub fn new_todo() -> CreateTodoRequest {
    let todo = Todo {
        title: "Water the plants".to_owned(),
        description: "All of them, before it gets hot".to_owned(),
        state: TodoState::Todo.into(),
        ..Default::default()
    };
    CreateTodoRequest { todo: Some(todo) }
}

/// A change of a to-do's state.
pub fn update_of_state(todo: Todo) -> UpdateTodoRequest {
    let update_mask = Some(FieldMask { paths: vec!["state".to_owned()] });
    UpdateTodoRequest { todo: Some(todo), update_mask }
}

/// A new user.
pub fn new_user(username: &str) -> CreateUserRequest {
    CreateUserRequest {
        username: username.to_owned(),
        email: format!("{username}@example.com"),
        password: PASSWORD.to_owned(),
    }
}
