//! What the scenarios need of a seeded database: logged-in callers and their todos.

use std::{
    iter,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use fast_zero::proto::auth::v1::{LoginRequest, RefreshTokenRequest, TokenSet};
use tokio::sync::Mutex;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
};

use crate::{
    client::Client,
    error::Result,
    requests::{PASSWORD, list_todos},
    seed::{DatasetSize, todo_id, username},
};

/// The number of users that make calls. Each has one session for the whole run.
pub const CALLER_COUNT: u32 = 64;

/// The logins of owners of watched todos in flight: the service rejects more than a few.
const LOGINS_IN_FLIGHT: u32 = 2;

/// A logged-in user.
pub struct Caller {
    user: u32,
    authorization: MetadataValue<Ascii>,
    /// Locked during a refresh, because each refresh token is valid once.
    refresh_token: Mutex<String>,
}

impl Caller {
    async fn log_in(client: &mut Client, user: u32) -> Result<Self> {
        let tokens = log_in(client, user).await?;
        Ok(Self {
            user,
            authorization: format!("Bearer {}", tokens.access_token).parse()?,
            refresh_token: Mutex::new(tokens.refresh_token),
        })
    }

    /// Returns a request with this caller's access token.
    pub fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        request
    }

    /// Returns the ID of one of this caller's todos, counted from 0.
    pub fn todo_id(&self, todo: u32) -> String {
        todo_id(self.user, todo).to_string()
    }

    pub async fn refresh(&self, client: &mut Client) -> Result<(), Status> {
        let mut token = self.refresh_token.lock().await;
        let request = RefreshTokenRequest { refresh_token: token.clone() };
        let tokens = client.auth.refresh_token(request).await?.into_inner().tokens;
        *token = tokens.unwrap_or_default().refresh_token;
        Ok(())
    }
}

pub struct Fixtures {
    size: DatasetSize,
    callers: Vec<Caller>,
    /// The users whose todos are watched, one session each. Empty unless watches are measured.
    pub watched: Vec<Caller>,
    pub long_list_owner: Caller,
    /// The page token of a deep page of the long list. Empty until
    /// [`Fixtures::page_through`] has run.
    pub deep_page_token: String,
    sign_ups: Arc<AtomicU32>,
}

impl Fixtures {
    /// Logs the callers in, and the first users as the owners of watched todos.
    pub async fn log_in_all(
        client: &mut Client,
        size: DatasetSize,
        watched_count: u32,
    ) -> Result<Self> {
        Ok(Self {
            size,
            callers: log_in_each(client.clone(), 1..CALLER_COUNT + 1).await?,
            watched: log_in_concurrently(client, watched_count).await?,
            long_list_owner: Caller::log_in(client, 0).await?,
            deep_page_token: String::new(),
            sign_ups: Arc::default(),
        })
    }

    /// Shares what does not depend on the access tokens with other fixtures of the same database.
    pub fn share(&mut self, other: &Self) {
        self.deep_page_token.clone_from(&other.deep_page_token);
        self.sign_ups = other.sign_ups.clone();
    }

    /// Pages through the long list and stores the page token of this page, counted from 1.
    pub async fn page_through(&mut self, client: &mut Client, page: u32) -> Result<()> {
        let mut token = String::new();
        for _ in 1..page {
            let request = self.long_list_owner.authorized(list_todos("", &token));
            token = client.todos.list_todos(request).await?.into_inner().next_page_token;
            if token.is_empty() {
                return Err(format!("the long list has fewer than {page} pages").into());
            }
        }
        self.deep_page_token = token;
        Ok(())
    }

    /// Returns one of the callers. All numbers are valid.
    pub fn caller(&self, number: usize) -> &Caller {
        &self.callers[number % self.callers.len()]
    }

    /// Returns one of the owners of watched todos. All numbers are valid.
    pub fn watched(&self, number: usize) -> &Caller {
        &self.watched[number % self.watched.len()]
    }

    /// Returns the ID of a random todo of the caller.
    pub fn random_todo_id(&self, caller: &Caller) -> String {
        caller.todo_id(fastrand::u32(..self.size.min_todos_per_user()))
    }

    /// Logs in a random user that is not a caller, because a login deletes the oldest of
    /// many sessions.
    pub async fn log_in_other(&self, client: &mut Client) -> Result<(), Status> {
        let user = fastrand::u32(CALLER_COUNT + 1..self.size.users);
        log_in(client, user).await.map(drop)
    }

    /// Returns a username that is not in the database.
    pub fn new_username(&self) -> String {
        format!("new{}", self.sign_ups.fetch_add(1, Ordering::Relaxed))
    }
}

async fn log_in_each(mut client: Client, users: Range<u32>) -> Result<Vec<Caller>> {
    let mut callers = Vec::new();
    for user in users {
        callers.push(Caller::log_in(&mut client, user).await?);
    }
    Ok(callers)
}

/// Logs the first `count` users in.
async fn log_in_concurrently(client: &Client, count: u32) -> Result<Vec<Caller>> {
    let step = count.div_ceil(LOGINS_IN_FLIGHT).max(1);
    let starts = iter::successors(Some(0), |start| Some(start + step));
    let ranges = starts.map(|start| start..count.min(start + step));
    let tasks: Vec<_> = ranges
        .take_while(|users| !users.is_empty())
        .map(|users| tokio::spawn(log_in_each(client.clone(), users)))
        .collect();
    let mut callers = Vec::new();
    for task in tasks {
        callers.extend(task.await??);
    }
    Ok(callers)
}

async fn log_in(client: &mut Client, user: u32) -> Result<TokenSet, Status> {
    let (login, password) = (username(user), PASSWORD.to_owned());
    let response = client.auth.login(LoginRequest { login, password }).await?;
    Ok(response.into_inner().tokens.unwrap_or_default())
}
