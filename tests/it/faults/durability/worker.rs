//! A user with a model of the data that it wrote.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use fast_zero::proto::{
    auth::v1::LogoutScope,
    todo::v1::{ListTodosRequest, Todo, TodoState},
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

/// A user, and all that is theirs as far as they know.
pub(super) struct Worker {
    pub(super) name: String,
    pub(super) password: String,
    pub(super) rng: Rng,
    /// With the session that makes the calls, which does not end.
    pub(super) client: Client,
    /// Of that session; `None` if the answer to the last refresh was lost.
    pub(super) refresh_token: Option<String>,
    pub(super) todos: BTreeMap<String, Todo>,
    /// The other sessions; without tokens if the answer to the login was lost.
    pub(super) others: BTreeMap<String, Option<Client>>,
    /// Sessions that have ended.
    pub(super) revoked: Vec<Client>,
    /// The call whose answer was lost in the crash.
    pub(super) unknown: Option<Call>,
    pub(super) acknowledged: usize,
}

/// A write.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Create(Todo),
    Update(Todo),
    Delete(String),
    LogIn,
    Refresh(String),
    Revoke(String),
    LogOutOthers,
    ChangePassword(String),
}

/// What there is of a user: to-dos, and the ids of sessions.
pub(super) type Seen = (BTreeMap<String, Todo>, BTreeSet<String>);

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
            others: BTreeMap::new(),
            revoked: Vec::new(),
            unknown: None,
            acknowledged: 0,
        }
    }

    /// Makes calls until it is to stop, or does not know what came of one.
    pub(super) async fn work(
        mut self,
        acknowledge: UnboundedSender<()>,
        stop: CancellationToken,
    ) -> Self {
        while !stop.is_cancelled() {
            let call = self.any_call();
            match self.make(&call).await {
                Ok(()) => {
                    self.acknowledged += 1;
                    // Nobody counts any more after the crash.
                    let _ = acknowledge.send(());
                }
                Err(status) => {
                    assert!(is_unknown(&status), "{call:?}: {status:?}");
                    self.unknown = Some(call);
                    break;
                }
            }
        }
        self
    }

    pub(super) fn any_call(&mut self) -> Call {
        let todo = self.rng.choice(self.todos.values()).cloned();
        let other = self.rng.choice(self.others.keys()).cloned();
        let text = format!("{:016x}", self.rng.u64(..));
        match (self.rng.u8(..40), todo, other, self.refresh_token.clone()) {
            (0..12, Some(todo), ..) => {
                let (state, etag) = (self.any_state(), String::new());
                Call::Update(Todo { title: text, state, etag, ..todo })
            }
            (12..20, Some(todo), ..) => Call::Delete(todo.id),
            (20..23, ..) if self.others.len() < MAX_SESSIONS => Call::LogIn,
            (23..26, _, Some(other), _) => Call::Revoke(other),
            (26..28, .., Some(token)) => Call::Refresh(token),
            (28, ..) => Call::LogOutOthers,
            (29, ..) => Call::ChangePassword(text),
            _ => Call::Create(Todo { state: self.any_state(), ..todo_titled(&text) }),
        }
    }

    pub(super) fn any_state(&mut self) -> i32 {
        let states = [TodoState::Draft, TodoState::Todo, TodoState::Doing, TodoState::Done];
        self.rng.choice(states).expect("some").into()
    }

    /// Makes a call; once it is acknowledged, what it does is known.
    pub(super) async fn make(&mut self, call: &Call) -> Result<(), Status> {
        let client = self.client.clone();
        match call {
            Call::Create(todo) => {
                let answer = client.try_create_todo(Some(todo.clone())).await?;
                self.put(todo, answer.into_inner().todo.expect("a to-do"));
            }
            Call::Update(todo) => {
                let mask: &[&str] = &["title", "state"];
                let answer = client.try_update_todo(Some(todo.clone()), Some(mask)).await?;
                self.put(todo, answer.into_inner().todo.expect("a to-do"));
            }
            Call::Delete(id) => {
                client.try_delete_todo(id, "").await?;
                self.todos.remove(id);
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
                self.end(id);
            }
            Call::LogOutOthers => {
                client.try_log_out(LogoutScope::OtherSessions.into()).await?;
                self.end_others();
            }
            Call::ChangePassword(new) => {
                client.try_change_password(&self.password, new).await?;
                self.password.clone_from(new);
                self.end_others();
            }
        }
        Ok(())
    }

    pub(super) fn put(&mut self, sent: &Todo, todo: Todo) {
        assert_eq!((&todo.title, todo.state), (&sent.title, sent.state));
        self.todos.insert(todo.id.clone(), todo);
    }

    pub(super) fn end(&mut self, id: &str) {
        self.revoked.extend(self.others.remove(id).flatten());
    }

    pub(super) fn end_others(&mut self) {
        self.revoked.extend(mem::take(&mut self.others).into_values().flatten());
    }

    /// Reads everything, and compares it with what is known. Whether the call whose answer
    /// was lost was done, if there was one.
    pub(super) async fn check(mut self, channel: Channel) -> (Self, Option<bool>) {
        self.client = self.client.with_channel(&channel);
        let seen = self.look().await;
        let read_rpc_result = match self.unknown.take() {
            None => None,
            Some(call) => {
                let done = match &call {
                    Call::ChangePassword(new) => self.can_log_in(new).await,
                    _ => seen != self.known(),
                };
                if done {
                    let ended = self.revoked.len();
                    self.adopt(call, &seen);
                    self.have_ended_by_now(ended, &channel).await;
                }
                Some(done)
            }
        };
        assert_eq!(
            seen,
            self.known(),
            "{}, whose lost call was done: {read_rpc_result:?}",
            self.name
        );

        // A rotation that was forgotten would make this token one that was never used.
        if let Some(token) = self.refresh_token.take() {
            self.refresh_token = Some(self.client.refresh(&token).await.refresh_token);
        }
        for other in self.others.values().flatten() {
            assert!(
                other.clone().with_channel(&channel).is_session_active().await,
                "nobody ended it"
            );
        }
        for ended in &self.revoked {
            let ended = ended.clone().with_channel(&channel);
            assert!(!ended.is_session_active().await, "it was ended");
            let refused = ended.try_refresh(&ended.tokens().refresh_token).await;
            assert_unauthenticated(refused, "REFRESH_TOKEN_INVALID");
        }
        let password = self.password.clone();
        assert!(self.can_log_in(&password).await, "it is the password");
        (self, read_rpc_result)
    }

    pub(super) fn known(&self) -> Seen {
        let own = self.client.tokens().session_id.clone();
        (self.todos.clone(), self.others.keys().cloned().chain([own]).collect())
    }

    pub(super) async fn look(&self) -> Seen {
        let todos = self.client.list_all_todos(ListTodosRequest::default()).await;
        let sessions = self.client.list_sessions().await;
        let todos = todos.into_iter().map(|todo| (todo.id.clone(), todo));
        (todos.collect(), sessions.into_iter().map(|session| session.id).collect())
    }

    /// Logs in, and out again.
    pub(super) async fn can_log_in(&mut self, password: &str) -> bool {
        match self.client.logged_in(&self.name, password).await {
            Ok(session) => {
                session.log_out(LogoutScope::ThisSession).await;
                self.revoked.push(session);
                true
            }
            Err(refused) => {
                assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
                false
            }
        }
    }

    /// Makes a call that was done known. What it made is what was seen and fits.
    pub(super) fn adopt(&mut self, call: Call, (todos, sessions): &Seen) {
        match call {
            Call::Create(sent) => {
                let made = todos.values().find(|todo| todo.title == sent.title);
                self.put(&sent, made.expect("nothing else was called").clone());
            }
            Call::Update(sent) => {
                let made = todos.get(&sent.id).expect("nobody deleted it");
                self.put(&sent, made.clone());
            }
            Call::Delete(id) => drop(self.todos.remove(&id)),
            Call::LogIn => {
                let (_, known) = self.known();
                self.others
                    .extend(sessions.difference(&known).map(|id| (id.clone(), None)).take(1));
            }
            Call::Refresh(_) => {}
            Call::Revoke(id) => self.end(&id),
            Call::LogOutOthers => self.end_others(),
            Call::ChangePassword(new) => {
                self.password = new;
                self.end_others();
            }
        }
    }

    /// A server that outlived its database does not know whether it ended a session, and
    /// may take it for alive for the five seconds that it may take.
    pub(super) async fn have_ended_by_now(&self, from: usize, channel: &Channel) {
        for ended in &self.revoked[from..] {
            let ended = ended.clone().with_channel(channel);
            let noticed = async { while ended.is_session_active().await {} };
            with_timeout("the end of a session is noticed", noticed).await;
        }
    }
}

/// The answer was lost, or says that the database was: the call may have been done.
pub(super) fn is_unknown(status: &Status) -> bool {
    let details = status.get_error_details();
    // Every answer of the service has a reason.
    let reason = details.error_info().map(|info| &*info.reason);
    reason.is_none_or(|reason| ["DATABASE_UNAVAILABLE", "DEADLINE_EXCEEDED"].contains(&reason))
}
