//! A user with a model of its data.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use fast_zero::proto::{
    auth::v1::LogoutScope,
    todo::v1::{DeletedTodo, ListTodosRequest, Todo, TodoState},
};
use fastrand::Rng;
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

use super::{MAX_SESSIONS, service::Service};
use crate::support::{
    Client, PASSWORD, assert::assert_unauthenticated, todos::todo_titled, wait::with_timeout,
};

/// A user with a model of its data.
pub(super) struct Worker {
    pub(super) name: String,
    pub(super) password: String,
    pub(super) rng: Rng,
    /// The client of the session that makes the calls, which is never revoked.
    pub(super) client: Client,
    /// The refresh token of that session. `None` if the last refresh had no response.
    pub(super) refresh_token: Option<String>,
    pub(super) todos: BTreeMap<String, Todo>,
    /// The deleted todos that are not purged.
    pub(super) deleted: BTreeMap<String, DeletedTodo>,
    /// The other sessions by id, without a client if the login had no response.
    pub(super) others: BTreeMap<String, Option<Client>>,
    /// Revoked sessions.
    pub(super) revoked: Vec<Client>,
    /// The call that had no response because of the crash.
    pub(super) lost_call: Option<Call>,
    pub(super) acknowledged: usize,
}

/// A write.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Create(Todo),
    Update(Todo),
    Delete(String),
    Undelete(String),
    Purge(String),
    LogIn,
    Refresh(String),
    Revoke(String),
    LogOutOthers,
    ChangePassword(String),
}

/// The data of a user.
#[derive(Debug, PartialEq)]
pub(super) struct UserData {
    pub(super) todos: BTreeMap<String, Todo>,
    pub(super) deleted: BTreeMap<String, DeletedTodo>,
    /// The ids of sessions.
    pub(super) sessions: BTreeSet<String>,
}

impl Worker {
    pub(super) async fn new(service: &Service, number: usize, rng: Rng) -> Self {
        let name = format!("worker{number}");
        let anonymous = Client::new(service.channel.clone());
        anonymous.sign_up(&name, &format!("{name}@example.com"), PASSWORD).await;
        let client = anonymous.logged_in(&name, PASSWORD).await.expect("logged in");
        Self {
            name,
            password: PASSWORD.to_owned(),
            rng,
            refresh_token: Some(client.tokens().refresh_token.clone()),
            client,
            todos: BTreeMap::new(),
            deleted: BTreeMap::new(),
            others: BTreeMap::new(),
            revoked: Vec::new(),
            lost_call: None,
            acknowledged: 0,
        }
    }

    /// Makes calls until `stop` is cancelled or the outcome of a call is unknown.
    pub(super) async fn work(
        mut self,
        acknowledge: UnboundedSender<()>,
        stop: CancellationToken,
    ) -> Self {
        while !stop.is_cancelled() {
            let call = self.random_call();
            match self.perform(&call).await {
                Ok(()) => {
                    self.acknowledged += 1;
                    // The receiver is dropped after the crash.
                    let _ = acknowledge.send(());
                }
                Err(status) => {
                    assert!(is_outcome_unknown(&status), "{call:?}: {status:?}");
                    self.lost_call = Some(call);
                    break;
                }
            }
        }
        self
    }

    pub(super) fn random_call(&mut self) -> Call {
        let todo = self.rng.choice(self.todos.values()).cloned();
        let deleted = self.rng.choice(self.deleted.keys()).cloned();
        let other = self.rng.choice(self.others.keys()).cloned();
        let text = format!("{:016x}", self.rng.u64(..));
        match (self.rng.u8(..40), todo, other, self.refresh_token.clone()) {
            (0..12, Some(todo), ..) => {
                let (state, etag) = (self.random_state(), String::new());
                Call::Update(Todo { title: text, state, etag, ..todo })
            }
            (12..20, Some(todo), ..) => Call::Delete(todo.id),
            (20..23, ..) if self.others.len() < MAX_SESSIONS => Call::LogIn,
            (23..26, _, Some(other), _) => Call::Revoke(other),
            (26..28, .., Some(token)) => Call::Refresh(token),
            (28, ..) => Call::LogOutOthers,
            (29, ..) => Call::ChangePassword(text),
            (30..33, ..) if deleted.is_some() => Call::Undelete(deleted.unwrap_or_default()),
            (33, ..) if deleted.is_some() => Call::Purge(deleted.unwrap_or_default()),
            _ => Call::Create(Todo { state: self.random_state(), ..todo_titled(&text) }),
        }
    }

    pub(super) fn random_state(&mut self) -> i32 {
        let states = [TodoState::Draft, TodoState::Todo, TodoState::Doing, TodoState::Done];
        self.rng.choice(states).expect("not empty").into()
    }

    /// Makes a call, and applies it to the model once it is acknowledged.
    pub(super) async fn perform(&mut self, call: &Call) -> Result<(), Status> {
        let client = self.client.clone();
        match call {
            Call::Create(todo) => {
                let response = client.try_create_todo(Some(todo.clone())).await?;
                self.insert_todo(todo, response.into_inner().todo.expect("a todo"));
            }
            Call::Update(todo) => {
                let mask: &[&str] = &["title", "state"];
                let response = client.try_update_todo(Some(todo.clone()), Some(mask)).await?;
                self.insert_todo(todo, response.into_inner().todo.expect("a todo"));
            }
            Call::Delete(id) => {
                let response = client.try_delete_todo(id, "").await?;
                let deleted = response.into_inner().deleted.expect("a deleted todo");
                self.todos.remove(id);
                self.deleted.insert(id.clone(), deleted);
            }
            Call::Undelete(id) => {
                let response = client.try_undelete_todo(id).await?;
                self.deleted.remove(id);
                self.todos.insert(id.clone(), response.into_inner().todo.expect("a todo"));
            }
            Call::Purge(id) => {
                client.try_purge_todo(id, "").await?;
                self.deleted.remove(id);
            }
            Call::LogIn => {
                let session = client.logged_in(&self.name, &self.password).await?;
                self.others.insert(session.tokens().session_id.clone(), Some(session));
            }
            Call::Refresh(token) => {
                self.refresh_token = None;
                let tokens = client.try_refresh(token).await?.into_inner().tokens;
                self.refresh_token = Some(tokens.expect("tokens").refresh_token);
            }
            Call::Revoke(id) => {
                client.try_revoke_session(id).await?;
                self.revoke(id);
            }
            Call::LogOutOthers => {
                client.try_log_out(LogoutScope::OtherSessions.into()).await?;
                self.revoke_others();
            }
            Call::ChangePassword(new) => {
                client.try_change_password(&self.password, new).await?;
                self.password.clone_from(new);
                self.revoke_others();
            }
        }
        Ok(())
    }

    pub(super) fn insert_todo(&mut self, sent: &Todo, todo: Todo) {
        assert_eq!((&todo.title, todo.state), (&sent.title, sent.state));
        self.todos.insert(todo.id.clone(), todo);
    }

    pub(super) fn revoke(&mut self, id: &str) {
        self.revoked.extend(self.others.remove(id).flatten());
    }

    pub(super) fn revoke_others(&mut self) {
        self.revoked.extend(mem::take(&mut self.others).into_values().flatten());
    }

    /// Reads all data and compares it with the model. Returns whether the call without a
    /// response was done, or `None` if there was no such call.
    pub(super) async fn check(mut self, channel: Channel) -> (Self, Option<bool>) {
        self.client = self.client.with_channel(&channel);
        let data = self.read_data().await;
        let lost_call_was_done = match self.lost_call.take() {
            None => None,
            Some(call) => {
                let done = match &call {
                    Call::ChangePassword(new) => self.can_log_in(new).await,
                    _ => data != self.model_data(),
                };
                if done {
                    let first = self.revoked.len();
                    self.apply(call, &data);
                    self.wait_until_revoked(first, &channel).await;
                }
                Some(done)
            }
        };
        assert_eq!(
            data,
            self.model_data(),
            "{}, whose lost call was done: {lost_call_was_done:?}",
            self.name
        );

        // If the database had lost the rotation, this token would be invalid.
        if let Some(token) = self.refresh_token.take() {
            self.refresh_token = Some(self.client.refresh(&token).await.refresh_token);
        }
        for other in self.others.values().flatten() {
            assert!(
                other.clone().with_channel(&channel).is_session_active().await,
                "no call revoked it"
            );
        }
        for revoked_session in &self.revoked {
            let revoked_session = revoked_session.clone().with_channel(&channel);
            assert!(!revoked_session.is_session_active().await, "a call revoked it");
            let rejected =
                revoked_session.try_refresh(&revoked_session.tokens().refresh_token).await;
            assert_unauthenticated(rejected, "REFRESH_TOKEN_INVALID");
        }
        let password = self.password.clone();
        assert!(self.can_log_in(&password).await, "the acknowledged password is valid");
        (self, lost_call_was_done)
    }

    pub(super) fn model_data(&self) -> UserData {
        let own = self.client.tokens().session_id.clone();
        UserData {
            todos: self.todos.clone(),
            deleted: self.deleted.clone(),
            sessions: self.others.keys().cloned().chain([own]).collect(),
        }
    }

    pub(super) async fn read_data(&self) -> UserData {
        let todos = self.client.list_all_todos(ListTodosRequest::default()).await;
        let sessions = self.client.list_sessions().await;
        let deleted = self.client.list_deleted_todos(0).await;
        let id = |deleted: &DeletedTodo| deleted.todo.as_ref().expect("a todo").id.clone();
        UserData {
            todos: todos.into_iter().map(|todo| (todo.id.clone(), todo)).collect(),
            deleted: deleted.into_iter().map(|deleted| (id(&deleted), deleted)).collect(),
            sessions: sessions.into_iter().map(|session| session.id).collect(),
        }
    }

    /// Returns `true` if the login succeeds, and logs out again.
    pub(super) async fn can_log_in(&mut self, password: &str) -> bool {
        match self.client.logged_in(&self.name, password).await {
            Ok(session) => {
                session.log_out(LogoutScope::ThisSession).await;
                self.revoked.push(session);
                true
            }
            Err(rejected) => {
                assert_eq!(rejected.code(), Code::Unauthenticated, "{rejected:?}");
                false
            }
        }
    }

    /// Applies a call without a response, but with a visible outcome, to the model.
    pub(super) fn apply(&mut self, call: Call, data: &UserData) {
        let UserData { todos, deleted, sessions } = data;
        match call {
            Call::Create(sent) => {
                let made = todos.values().find(|todo| todo.title == sent.title);
                self.insert_todo(&sent, made.expect("the created todo").clone());
            }
            Call::Update(sent) => {
                let made = todos.get(&sent.id).expect("the updated todo");
                self.insert_todo(&sent, made.clone());
            }
            Call::Delete(id) => {
                self.todos.remove(&id);
                let made = deleted.get(&id).expect("the deleted todo").clone();
                self.deleted.insert(id, made);
            }
            Call::Undelete(id) => {
                self.deleted.remove(&id);
                let made = todos.get(&id).expect("the restored todo").clone();
                self.todos.insert(id, made);
            }
            Call::Purge(id) => drop(self.deleted.remove(&id)),
            Call::LogIn => {
                let known = self.model_data().sessions;
                self.others
                    .extend(sessions.difference(&known).map(|id| (id.clone(), None)).take(1));
            }
            Call::Refresh(_) => {}
            Call::Revoke(id) => self.revoke(&id),
            Call::LogOutOthers => self.revoke_others(),
            Call::ChangePassword(new) => {
                self.password = new;
                self.revoke_others();
            }
        }
    }

    /// Waits until revoked sessions are inactive. A server that survived the crash of its
    /// database may have cached them as active for up to five seconds.
    pub(super) async fn wait_until_revoked(&self, from: usize, channel: &Channel) {
        for revoked_session in &self.revoked[from..] {
            let revoked_session = revoked_session.clone().with_channel(channel);
            let noticed = async { while revoked_session.is_session_active().await {} };
            with_timeout("the revocation of a session", noticed).await;
        }
    }
}

/// Returns `true` if the call may have been done: there was no response, or it reports an
/// unavailable database.
pub(super) fn is_outcome_unknown(status: &Status) -> bool {
    let details = status.get_error_details();
    // Every response of the service has a reason.
    let reason = details.error_info().map(|info| &*info.reason);
    reason.is_none_or(|reason| ["DATABASE_UNAVAILABLE", "DEADLINE_EXCEEDED"].contains(&reason))
}
