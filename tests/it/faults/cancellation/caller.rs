//! A caller that abandons most of its calls.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fast_zero::proto::{
    auth::v1::{ListSessionsRequest, LogoutScope},
    todo::v1::{ListTodosRequest, Todo},
    user::v1::ListUsersRequest,
};
use fastrand::Rng;
use tokio::time::timeout;
use tonic::{
    Code, Status,
    transport::{Channel, Error as TransportError},
};
use uuid::Uuid;

use super::{
    CALLS_PER_CONNECTION, METHODS, NEW, PATIENCE, REGULAR, REQUESTS,
    state::{Deed, Stage, Victim},
};
use crate::support::{
    App, Client, PASSWORD, RpcResult, app::connect, todos::todo_titled, users::own_user,
};

/// Makes calls, one after the other, and does not wait for most of them.
pub(super) struct Caller {
    pub(super) client: Client,
    /// On which calls are given up.
    pub(super) channel: Channel,
    pub(super) number: usize,
    pub(super) rng: Rng,
    /// Of the client's session: the one that was not used yet.
    pub(super) refresh_token: String,
    /// One that stays, and those that may be deleted.
    pub(super) todo: Todo,
    pub(super) todos: Vec<Todo>,
}

impl Caller {
    pub(super) async fn new(app: &App, number: usize, seed: u64) -> Self {
        let client = app.signed_up(&format!("caller{number}")).await;
        let refresh_token = client.tokens().refresh_token.clone();
        let todo = client.create_todo("0").await;
        let rng = Rng::with_seed(seed.wrapping_add(number as u64));
        let channel = app.channel.clone();
        Self { client, channel, number, rng, refresh_token, todo, todos: Vec::new() }
    }

    pub(super) async fn make_calls(mut self, stage: Arc<Stage>, calls: usize) {
        for call in 0..calls {
            if call % CALLS_PER_CONNECTION == 0 {
                self.channel = connect(stage.address).await;
            }
            let method = self.rng.usize(..METHODS.len());
            self.make_call(&stage, method, call).await;
        }
    }

    /// One call that is given up after a random time: by its deadline, which the server
    /// keeps, or because the caller is gone.
    pub(super) async fn make_call(&mut self, stage: &Stage, method: usize, call: usize) {
        let request_id = format!("{REQUESTS}{}-{call}", self.number);
        let channel = self.channel.clone();
        let longest = 1 << self.rng.u32(PATIENCE);
        let micros = self.rng.u64(longest / 2..longest);
        let by_deadline = self.rng.u8(..4) == 0;
        let prepare = |client: Client| {
            let client = client.with_channel(&channel).with_metadata("x-request-id", &request_id);
            if by_deadline {
                client.with_metadata("grpc-timeout", &format!("{micros}u"))
            } else {
                client
            }
        };

        let (name, refusals) = METHODS[method];
        let deed = self.deed(name);
        let victim = deed.map(|deed| (stage.victim(), deed));
        let client = match &victim {
            Some((victim, _)) => victim.client(&channel),
            None => self.client.clone(),
        };
        let call = self.call(name, victim, prepare(client));
        let patience = if by_deadline { 10_000_000 } else { micros };
        let answer = timeout(Duration::from_micros(patience), call).await;
        let figures = &stage.figures[method];
        let count = match &answer {
            Ok(Ok(())) => &figures.answered,
            Ok(Err(refused)) if by_deadline && is_late(refused) => &figures.given_up,
            Ok(Err(refused)) => {
                assert!(refusals.contains(&refused.code()), "{name}: {refused:?}");
                &figures.refused
            }
            Err(_) => {
                assert!(!by_deadline, "{name}: the deadline was not kept");
                &figures.given_up
            }
        };
        count.fetch_add(1, Ordering::Relaxed);
        if let Some((victim, deed)) = victim {
            let answered = matches!(answer, Ok(Ok(())));
            stage.used.lock().expect("no panic").push((victim, deed, answered));
        }
        self.follow_up(name).await;
    }

    pub(super) fn deed(&mut self, method: &str) -> Option<Deed> {
        let scopes =
            [LogoutScope::ThisSession, LogoutScope::OtherSessions, LogoutScope::AllSessions];
        match method {
            "DeleteUser" => Some(Deed::DeleteUser),
            "ChangePassword" => Some(Deed::ChangePassword),
            "RevokeSession" => Some(Deed::RevokeOther),
            "Logout" => self.rng.choice(scopes).map(Deed::Logout),
            _ => None,
        }
    }

    /// Gets ready what the next call needs, with a call that is waited for.
    pub(super) async fn follow_up(&mut self, method: &str) {
        match method {
            // Whether the answer was lost or there was none, the token is good for
            // another: it is the current one or its direct predecessor.
            "RefreshToken" => {
                self.client.refresh(&self.refresh_token).await;
                // The call that was given up may still come, and after two more refreshes
                // it would be a reuse: the next ones are of another session.
                let login = format!("caller{}", self.number);
                self.client = self.client.logged_in(&login, PASSWORD).await.expect("logged in");
                self.refresh_token.clone_from(&self.client.tokens().refresh_token);
            }
            "DeleteTodo" => self.todos.push(self.client.create_todo("to be deleted").await),
            _ => {}
        }
    }

    /// The call itself. It takes what it needs with it, since nobody may wait for it.
    pub(super) fn call(
        &mut self,
        method: &'static str,
        victim: Option<(Victim, Deed)>,
        client: Client,
    ) -> impl Future<Output = Result<(), Status>> + Send + 'static {
        let username = format!("new{}", Uuid::now_v7().simple());
        let username = username[..32].to_owned();
        let number = self.number;
        let refresh_token = self.refresh_token.clone();
        let access_token = self.client.tokens().access_token.clone();
        let text = self.rng.u32(..).to_string();
        let changed = Todo { title: text.clone(), description: text.clone(), ..self.todo.clone() };
        let changed = Todo { etag: String::new(), ..changed };
        let todo = if method == "DeleteTodo" { self.todos.pop() } else { None };
        let todo = todo.unwrap_or_else(|| self.todo_that_was_deleted());
        async move {
            match method {
                "CreateUser" => {
                    let email = format!("{username}@example.com");
                    none(client.try_sign_up(&username, &email, PASSWORD).await)
                }
                "GetUser" => none(client.try_get_user("me").await),
                "ListUsers" => {
                    let request = ListUsersRequest { page_size: 10, ..<_>::default() };
                    none(client.try_list_users(request).await)
                }
                "UpdateUser" => {
                    let user = own_user(&format!("caller{number}"), "");
                    none(client.try_update_user(Some(user), None).await)
                }
                "Login" => none(client.try_log_in(REGULAR, PASSWORD).await),
                "RefreshToken" => none(client.try_refresh(&refresh_token).await),
                "ListSessions" => none(client.auth().list_sessions(ListSessionsRequest {}).await),
                "IntrospectToken" => none(client.try_introspect(&access_token).await),
                "CreateTodo" => {
                    let todo = Todo { description: text.clone(), ..todo_titled(&text) };
                    none(client.try_create_todo(Some(todo)).await)
                }
                "GetTodo" => none(client.try_get_todo(&changed.id).await),
                "ListTodos" => {
                    let request = ListTodosRequest { page_size: 10, ..<_>::default() };
                    none(client.try_list_todos(request).await)
                }
                "UpdateTodo" => none(client.try_update_todo(Some(changed), None).await),
                "DeleteTodo" => none(client.try_delete_todo(&todo.id, "").await),
                _ => {
                    let (victim, deed) = victim.expect("all others end something");
                    commit(&client, &victim, deed).await
                }
            }
        }
    }

    /// Nothing that is there, but with a good id.
    pub(super) fn todo_that_was_deleted(&self) -> Todo {
        Todo { id: Uuid::now_v7().to_string(), ..self.todo.clone() }
    }
}

pub(super) async fn commit(client: &Client, victim: &Victim, deed: Deed) -> Result<(), Status> {
    match deed {
        Deed::DeleteUser => none(client.try_delete_user("me", "").await),
        Deed::ChangePassword => none(client.try_change_password(PASSWORD, NEW).await),
        Deed::RevokeOther => none(client.try_revoke_session(&victim.other.to_string()).await),
        Deed::Logout(scope) => none(client.try_log_out(scope.into()).await),
    }
}

/// Answers of all methods in one type.
pub(super) fn none<T>(answer: RpcResult<T>) -> Result<(), Status> {
    answer.map(drop)
}

/// The deadline has passed: the server says the one, the client's own clock the other.
pub(super) fn is_late(refused: &Status) -> bool {
    let by_client = std::error::Error::source(refused).is_some_and(|source| {
        source.is::<tonic::TimeoutExpired>() || source.is::<TransportError>()
    });
    refused.code() == Code::DeadlineExceeded || (refused.code() == Code::Cancelled && by_client)
}
