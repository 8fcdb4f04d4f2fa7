//! The rpcs on users.

use std::sync::Arc;

use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{Email, NewUser, User, UserChange, Username, sign_ups::SignUps, store};
use crate::{
    audit,
    caller::{Caller, LiveSessions, Peer},
    coalesce::Coalescer,
    database::{Database, complete},
    error::Error,
    etag::{self, Guard},
    mask::Mask,
    pagination::{Page, PageFields, PageTokens, Scope},
    password::{Hasher, NewPassword},
    proto::{self, timestamp, user::v1 as pb},
    types::{clock, id::UserId},
    validation::{FieldViolations, REQUIRED},
};

/// Implements `fastzero.user.v1.UserService`.
#[derive(Debug)]
pub struct UserService {
    /// Where users are kept.
    pub database: Database,
    /// Looks up users.
    pub find: Coalescer<store::Find>,
    /// Hashes the passwords of new users.
    pub hasher: Hasher,
    /// Counts sign-ups.
    pub sign_ups: SignUps,
    /// To be told when a user is gone.
    pub live_sessions: Arc<LiveSessions>,
    /// For lists.
    pub page_tokens: PageTokens,
}

#[tonic::async_trait]
impl pb::user_service_server::UserService for UserService {
    async fn create_user(
        &self,
        request: Request<pb::CreateUserRequest>,
    ) -> Result<Response<pb::CreateUserResponse>, Status> {
        let peer = Peer::of(&request)?;
        let (user, password) = parse_new_user(&request.into_inner())?;
        let place = self.hasher.admit()?;
        self.sign_ups.take(peer, Instant::now())?.count();
        let hash = place.hash(password).await?;
        let user = self
            .database
            .run(async |connection| store::insert(connection, &user, &hash).await)
            .await?;
        audit::record("sign_up", Some(user.id), None);
        Ok(Response::new(pb::CreateUserResponse { user: Some(user.into()) }))
    }

    async fn get_user(
        &self,
        request: Request<pb::GetUserRequest>,
    ) -> Result<Response<pb::GetUserResponse>, Status> {
        let caller = Caller::of(&request)?;
        let id = parse_id("id", &request.into_inner().id, caller)?;
        let user = match self.find.ask(id).await? {
            Some(user) => seen_by(caller, user),
            None if id == caller.user_id => return Err(Error::SessionRevoked.into()),
            None => return Err(Error::UserNotFound.into()),
        };
        Ok(Response::new(pb::GetUserResponse { user: Some(user.into()) }))
    }

    async fn list_users(
        &self,
        request: Request<pb::ListUsersRequest>,
    ) -> Result<Response<pb::ListUsersResponse>, Status> {
        let caller = Caller::of(&request)?;
        let scope = Scope { list: "ListUsers", owner_id: caller.user_id, query: b"" };
        let page = self.parse_page(&request.into_inner(), &scope)?;
        let mut users =
            self.database.run(async |connection| store::list(connection, &page).await).await?;
        let size = usize::try_from(page.size).unwrap_or(usize::MAX);
        let more = users.len() > size;
        users.truncate(size);
        let last = users.last().filter(|_| more);
        let next_page_token =
            last.map_or_else(String::new, |user| self.page_tokens.seal(&user.id, &scope));
        let users = users.into_iter().map(|user| seen_by(caller, user).into()).collect();
        Ok(Response::new(pb::ListUsersResponse { users, next_page_token }))
    }

    async fn update_user(
        &self,
        request: Request<pb::UpdateUserRequest>,
    ) -> Result<Response<pb::UpdateUserResponse>, Status> {
        let (caller, peer) = (Caller::of(&request)?, Peer::of(&request)?);
        let Update { id, guard, change } = parse_update(request.into_inner(), caller)?;
        check_own(id, caller)?;
        let now = clock::now();
        // Taken before it is known whether it counts, so that those at once count too.
        let taken = self.sign_ups.take(peer, Instant::now())?;
        let user = self
            .database
            .run(async |connection| {
                let user = store::update(&mut *connection, id, guard, &change, now).await?;
                match user {
                    Some(user) => Ok(user),
                    None => Err(refusal(store::find(connection, id).await?.is_some())),
                }
            })
            .await;
        if matches!(user, Err(Error::UsernameExists | Error::EmailExists)) {
            taken.count();
        }
        Ok(Response::new(pb::UpdateUserResponse { user: Some(user?.into()) }))
    }

    async fn delete_user(
        &self,
        request: Request<pb::DeleteUserRequest>,
    ) -> Result<Response<pb::DeleteUserResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let id = parse_id("id", &request.id, caller)?;
        let guard = Guard::parse(&request.etag);
        check_own(id, caller)?;
        let (database, live_sessions) = (self.database.clone(), self.live_sessions.clone());
        complete(async move {
            let deleted = database
                .run(async |connection| {
                    if store::delete(&mut *connection, id, guard).await? {
                        return Ok(());
                    }
                    Err(refusal(store::find(connection, id).await?.is_some()))
                })
                .await;
            live_sessions.forget(id);
            deleted?;
            audit::record("user_deleted", Some(id), Some(caller.session_id));
            Ok(())
        })
        .await?;
        Ok(Response::new(pb::DeleteUserResponse {}))
    }
}

impl UserService {
    fn parse_page(
        &self,
        request: &pb::ListUsersRequest,
        scope: &Scope<'_>,
    ) -> Result<Page<UserId>, FieldViolations> {
        let mut violations = FieldViolations::default();
        let fields =
            PageFields { size: request.page_size, skip: request.skip, token: &request.page_token };
        let page = self.page_tokens.parse(&fields, scope, &mut violations);
        violations.finish(|| page)
    }
}

fn parse_new_user(
    request: &pb::CreateUserRequest,
) -> Result<(NewUser, NewPassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    let username = violations.check("username", Username::parse(&request.username));
    let email = violations.check("email", Email::parse(&request.email));
    let password = NewPassword::parse(&request.password).and_then(|password| {
        let names = [&*request.username, request.email.trim()];
        password.check_differs_from(&names).map(|()| password)
    });
    let password = violations.check("password", password);
    violations.finish(|| {
        let user = NewUser { id: UserId::generate(), username: username?, email: email? };
        Some((user, password?))
    })
}

fn parse_id(field: &'static str, id: &str, caller: Caller) -> Result<UserId, FieldViolations> {
    caller.resolve(id).map_err(|invalid| FieldViolations::single(field, invalid))
}

struct Update {
    id: UserId,
    guard: Guard,
    change: UserChange,
}

fn parse_update(request: pb::UpdateUserRequest, caller: Caller) -> Result<Update, FieldViolations> {
    let mut violations = FieldViolations::default();
    let mask = request.update_mask.as_ref();
    let Some(user) = request.user else {
        violations.add("user", REQUIRED);
        violations.check("update_mask", Mask::parse(mask, [("username", true), ("email", true)]));
        return Err(violations);
    };
    let id = violations.check("user.id", caller.resolve(&user.id));
    let writable = [("username", !user.username.is_empty()), ("email", !user.email.is_empty())];
    let mask = violations.check("update_mask", Mask::parse(mask, writable));
    let covers = |field| mask.as_ref().is_some_and(|mask| mask.covers(field));
    let username = covers("username")
        .then(|| violations.check("user.username", Username::parse(&user.username)))
        .flatten();
    let email = covers("email")
        .then(|| violations.check("user.email", Email::parse(&user.email)))
        .flatten();
    violations.finish(|| {
        let change = UserChange { username, email };
        Some(Update { id: id?, guard: Guard::parse(&user.etag), change })
    })
}

fn check_own(id: UserId, caller: Caller) -> Result<(), Error> {
    if id == caller.user_id { Ok(()) } else { Err(Error::NotEnoughPermissions) }
}

/// Why a change of the caller's own account found nothing to change.
fn refusal(exists: bool) -> Error {
    if exists { Error::EtagMismatch } else { Error::SessionRevoked }
}

fn seen_by(caller: Caller, user: User) -> User {
    if user.id == caller.user_id { user } else { user.without_email() }
}

impl From<User> for proto::user::v1::User {
    fn from(user: User) -> Self {
        Self {
            id: user.id.to_string(),
            username: user.username,
            email: user.email,
            create_time: Some(timestamp(user.id.create_time())),
            update_time: Some(timestamp(user.updated_at)),
            etag: etag::format(user.version),
        }
    }
}
