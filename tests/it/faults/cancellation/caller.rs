//! A caller that cancels most of its calls.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use fast_zero::proto::{
    auth::v1::{
        ListPersonalAccessTokensRequest, ListSessionsRequest, ListSigningKeysRequest, LogoutScope,
    },
    todo::v1::{ListDeletedTodosRequest, ListTodosRequest, Todo},
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
    CALLS_PER_CONNECTION, LOGIN_USERNAME, METHODS, NEW_PASSWORD, REQUEST_ID_PREFIX, WAIT_EXPONENTS,
    state::{Action, SharedState, TargetRow},
};
use crate::support::{
    App, Client, PASSWORD, RpcResult, app::connect, personal_access_tokens::new_token,
    todos::todo_titled, users::own_user,
};

/// Makes one call after another and cancels most of them.
pub(super) struct Caller {
    pub(super) client: Client,
    /// The connection of the cancelled calls.
    pub(super) channel: Channel,
    pub(super) number: usize,
    pub(super) rng: Rng,
    /// The unused refresh token of the client's session.
    pub(super) refresh_token: String,
    /// A todo that is never deleted.
    pub(super) todo: Todo,
    /// Todos that calls may delete.
    pub(super) todos: Vec<Todo>,
    /// The todo of the last call that deleted one.
    pub(super) deleted: Option<Todo>,
}

impl Caller {
    pub(super) async fn new(app: &App, number: usize, seed: u64) -> Self {
        let client = app.signed_up(&format!("caller{number}")).await;
        let refresh_token = client.tokens().refresh_token.clone();
        let todo = client.create_todo("0").await;
        let rng = Rng::with_seed(seed.wrapping_add(number as u64));
        let channel = app.channel.clone();
        Self { client, channel, number, rng, refresh_token, todo, todos: Vec::new(), deleted: None }
    }

    pub(super) async fn make_calls(mut self, state: Arc<SharedState>, calls: usize) {
        for call in 0..calls {
            if call % CALLS_PER_CONNECTION == 0 {
                self.channel = connect(state.address).await;
            }
            let method = self.rng.usize(..METHODS.len());
            self.make_call(&state, method, call).await;
        }
    }

    /// Makes one call and cancels it after a random time: by a deadline, which the server
    /// enforces, or by dropping it.
    pub(super) async fn make_call(&mut self, state: &SharedState, method: usize, call: usize) {
        let request_id = format!("{REQUEST_ID_PREFIX}{}-{call}", self.number);
        let channel = self.channel.clone();
        let longest = 1 << self.rng.u32(WAIT_EXPONENTS);
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

        let (name, allowed_errors) = METHODS[method];
        let action = self.action(name);
        let target = action.map(|action| (state.target(), action));
        let client = match &target {
            Some((target, _)) => target.client(&channel),
            None => self.client.clone(),
        };
        let call = self.call(name, target, prepare(client));
        let wait = if by_deadline { 10_000_000 } else { micros };
        let response = timeout(Duration::from_micros(wait), call).await;
        let counts = &state.counts[method];
        let counter = match &response {
            Ok(Ok(())) => &counts.succeeded,
            Ok(Err(rejected)) if by_deadline && is_deadline_exceeded(rejected) => &counts.cancelled,
            Ok(Err(rejected)) => {
                assert!(allowed_errors.contains(&rejected.code()), "{name}: {rejected:?}");
                &counts.rejected
            }
            Err(_) => {
                assert!(!by_deadline, "{name}: the server exceeded the deadline");
                &counts.cancelled
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if let Some((target, action)) = target {
            let succeeded = matches!(response, Ok(Ok(())));
            state.called.lock().expect("no panic").push((target, action, succeeded));
        }
        self.prepare_next_call(name).await;
    }

    pub(super) fn action(&mut self, method: &str) -> Option<Action> {
        let scopes =
            [LogoutScope::ThisSession, LogoutScope::OtherSessions, LogoutScope::AllSessions];
        match method {
            "DeleteUser" => Some(Action::DeleteUser),
            "ChangePassword" => Some(Action::ChangePassword),
            "ResetPassword" => Some(Action::ResetPassword),
            "RevokeSession" => Some(Action::RevokeOther),
            "RevokePersonalAccessToken" => Some(Action::RevokeToken),
            "Logout" => self.rng.choice(scopes).map(Action::Logout),
            _ => None,
        }
    }

    /// Prepares the next call of a method, with calls that are not cancelled.
    pub(super) async fn prepare_next_call(&mut self, method: &str) {
        match method {
            // Whether the cancelled call rotated the token or not, the token is valid: it is
            // the current one or its direct predecessor.
            "RefreshToken" => {
                self.client.refresh(&self.refresh_token).await;
                // The cancelled call may still arrive. After two more refreshes it would be a
                // reuse, so the next refreshes use another session.
                let login = format!("caller{}", self.number);
                self.client = self.client.logged_in(&login, PASSWORD).await.expect("logged in");
                self.refresh_token.clone_from(&self.client.tokens().refresh_token);
            }
            "CreatePersonalAccessToken" => {
                for token in self.client.list_tokens().await {
                    self.client.try_revoke_token(&token.id).await.expect("revoked");
                }
            }
            "DeleteTodo" => self.todos.push(self.client.create_todo("to be deleted").await),
            _ => {}
        }
    }

    /// Returns the call. The future owns its data, because the caller may drop it.
    pub(super) fn call(
        &mut self,
        method: &'static str,
        target: Option<(TargetRow, Action)>,
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
        let todo = match method {
            "DeleteTodo" => {
                self.deleted = self.todos.pop();
                self.deleted.clone()
            }
            "UndeleteTodo" => self.deleted.clone(),
            _ => None,
        };
        let todo = todo.unwrap_or_else(|| self.missing_todo());
        // Every other deletion purges.
        let purge = self.rng.bool();
        async move {
            match method {
                "CreateUser" => {
                    let email = format!("{username}@example.com");
                    discard(client.try_sign_up(&username, &email, PASSWORD).await)
                }
                "GetUser" => discard(client.try_get_user("me").await),
                "ListUsers" => {
                    let request = ListUsersRequest { page_size: 10, ..<_>::default() };
                    discard(client.try_list_users(request).await)
                }
                "UpdateUser" => {
                    let user = own_user(&format!("caller{number}"), "");
                    discard(client.try_update_user(Some(user), None).await)
                }
                "Login" => discard(client.try_log_in(LOGIN_USERNAME, PASSWORD).await),
                "RefreshToken" => discard(client.try_refresh(&refresh_token).await),
                "ListSessions" => {
                    discard(client.auth().list_sessions(ListSessionsRequest {}).await)
                }
                "ListSigningKeys" => {
                    discard(client.auth().list_signing_keys(ListSigningKeysRequest {}).await)
                }
                "CreatePersonalAccessToken" => {
                    discard(client.try_create_token(new_token(&["todo.read"])).await)
                }
                "ListPersonalAccessTokens" => {
                    let request = ListPersonalAccessTokensRequest {};
                    discard(client.auth().list_personal_access_tokens(request).await)
                }
                "IntrospectToken" => discard(client.try_introspect(&access_token).await),
                "CreateTodo" => {
                    let todo = Todo { description: text.clone(), ..todo_titled(&text) };
                    discard(client.try_create_todo(Some(todo)).await)
                }
                "GetTodo" => discard(client.try_get_todo(&changed.id).await),
                "ListTodos" => {
                    let request = ListTodosRequest { page_size: 10, ..<_>::default() };
                    discard(client.try_list_todos(request).await)
                }
                "UpdateTodo" => discard(client.try_update_todo(Some(changed), None).await),
                "DeleteTodo" if purge => discard(client.try_purge_todo(&todo.id, "").await),
                "DeleteTodo" => discard(client.try_delete_todo(&todo.id, "").await),
                "UndeleteTodo" => discard(client.try_undelete_todo(&todo.id).await),
                "ListDeletedTodos" => {
                    let request = ListDeletedTodosRequest { page_size: 10, ..<_>::default() };
                    discard(client.try_list_deleted_todos(request).await)
                }
                "SyncTodos" => discard(client.try_sync_todos(<_>::default()).await),
                "WatchTodos" => {
                    let stream = client.try_watch_todos(<_>::default()).await;
                    stream?.into_inner().message().await.map(drop)
                }
                _ => {
                    let (target, action) = target.expect("all other methods have a target");
                    perform(&client, &target, action).await
                }
            }
        }
    }

    /// Returns a todo with a valid id that does not exist.
    pub(super) fn missing_todo(&self) -> Todo {
        Todo { id: Uuid::now_v7().to_string(), ..self.todo.clone() }
    }
}

pub(super) async fn perform(
    client: &Client,
    target: &TargetRow,
    action: Action,
) -> Result<(), Status> {
    match action {
        Action::DeleteUser => discard(client.try_delete_user("me", "").await),
        Action::ChangePassword => discard(client.try_change_password(PASSWORD, NEW_PASSWORD).await),
        Action::ResetPassword => {
            discard(client.try_reset_password(&target.reset_code(), NEW_PASSWORD).await)
        }
        Action::RevokeToken => discard(client.try_revoke_token(&target.other.to_string()).await),
        Action::RevokeOther => discard(client.try_revoke_session(&target.other.to_string()).await),
        Action::Logout(scope) => discard(client.try_log_out(scope.into()).await),
    }
}

/// Discards the message, so that all methods return the same type.
pub(super) fn discard<T>(response: RpcResult<T>) -> Result<(), Status> {
    response.map(drop)
}

/// Returns `true` if the server or the client's own timeout reports an exceeded deadline.
pub(super) fn is_deadline_exceeded(rejected: &Status) -> bool {
    let by_client = std::error::Error::source(rejected).is_some_and(|source| {
        source.is::<tonic::TimeoutExpired>() || source.is::<TransportError>()
    });
    rejected.code() == Code::DeadlineExceeded || (rejected.code() == Code::Cancelled && by_client)
}
