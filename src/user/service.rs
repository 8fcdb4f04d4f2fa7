//! `fastzero.user.v1.UserService`.

use std::{fmt, sync::Arc};

use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{NewUser, User, UserPatch, Username, sign_up_limit::SignUpLimiter, store::UserStore};
use crate::{
    crypto::{hashing::HashingPool, password::NewPassword},
    rpc::{
        caller::{Caller, ClientIp, SessionCaller},
        error::Error,
        etag::{self, Precondition},
        page_token::{PageParams, PageRequest, PageTokenCodec, PageTokenScope},
        proto::{self, to_timestamp, user::v1 as pb},
        update_mask::UpdateMask,
        validation::{FieldViolations, REQUIRED},
    },
    telemetry::audit,
    types::{clock::Clock, email::Email, id::UserId},
};

/// The implementation of `UserService`.
pub(crate) struct UserService {
    /// The users.
    pub(crate) store: UserStore,
    /// Hashes the passwords of new users.
    pub(crate) passwords: HashingPool,
    /// Limits sign-ups.
    pub(crate) sign_ups: SignUpLimiter,
    /// Invalidates a user's cached sessions. Called after the user was deleted.
    pub(crate) invalidate_sessions: Arc<dyn Fn(UserId) + Send + Sync>,
    /// Encodes the page tokens of lists.
    pub(crate) page_tokens: PageTokenCodec,
}

impl fmt::Debug for UserService {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("UserService").finish_non_exhaustive()
    }
}

#[tonic::async_trait]
impl pb::user_service_server::UserService for UserService {
    async fn create_user(
        &self,
        request: Request<pb::CreateUserRequest>,
    ) -> Result<Response<pb::CreateUserResponse>, Status> {
        let client_ip = ClientIp::from_request(&request)?;
        let (user, password) = parse_new_user(&request.into_inner(), self.store.clock())?;
        let slot = self.passwords.try_enqueue()?;
        self.sign_ups.try_acquire(client_ip, Instant::now())?.commit();
        let hash = slot.hash(password).await?;
        let on_created = |user: &User| audit::record("sign_up", Some(user.id), None);
        let user = self.store.create(user, hash, on_created).await?;
        Ok(Response::new(pb::CreateUserResponse { user: Some(user.into()) }))
    }

    async fn get_user(
        &self,
        request: Request<pb::GetUserRequest>,
    ) -> Result<Response<pb::GetUserResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let id = parse_id("id", &request.into_inner().id, caller)?;
        let user = match self.store.get(id).await? {
            Some(user) => visible_to(caller, user),
            None if id == caller.user_id => return Err(caller.credential.revoked_error().into()),
            None => return Err(Error::UserNotFound.into()),
        };
        Ok(Response::new(pb::GetUserResponse { user: Some(user.into()) }))
    }

    async fn list_users(
        &self,
        request: Request<pb::ListUsersRequest>,
    ) -> Result<Response<pb::ListUsersResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let scope = PageTokenScope { list: "ListUsers", owner_id: caller.user_id, query: b"" };
        let page = self.parse_page(&request.into_inner(), &scope)?;
        let page = self.store.list(&page).await?;
        let last = page.users.last().filter(|_| page.has_more);
        let next_page_token =
            last.map_or_else(String::new, |user| self.page_tokens.encode(&user.id, &scope));
        let users = page.users.into_iter().map(|user| visible_to(caller, user).into()).collect();
        Ok(Response::new(pb::ListUsersResponse { users, next_page_token }))
    }

    async fn update_user(
        &self,
        request: Request<pb::UpdateUserRequest>,
    ) -> Result<Response<pb::UpdateUserResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let client_ip = ClientIp::from_request(&request)?;
        let UserUpdate { id, precondition, patch } = parse_update(request.into_inner(), caller)?;
        require_self(id, caller)?;
        // Acquired before the outcome is known, so that concurrent updates count, too.
        let permit = self.sign_ups.try_acquire(client_ip, Instant::now())?;
        let user = self.store.update(id, precondition, &patch).await;
        if matches!(user, Err(Error::UsernameExists | Error::EmailExists)) {
            permit.commit();
        }
        let user = user.map_err(|error| caller.own_user_error(error))?;
        Ok(Response::new(pb::UpdateUserResponse { user: Some(user.into()) }))
    }

    async fn delete_user(
        &self,
        request: Request<pb::DeleteUserRequest>,
    ) -> Result<Response<pb::DeleteUserResponse>, Status> {
        let caller = SessionCaller::from_request(&request)?;
        let request = request.into_inner();
        let id = parse_id("id", &request.id, caller.into())?;
        let precondition = Precondition::parse(&request.etag);
        require_self(id, caller.into())?;
        let invalidate_sessions = self.invalidate_sessions.clone();
        let on_deleted = move |is_deleted| {
            invalidate_sessions(id);
            if is_deleted {
                audit::record("user_deleted", Some(id), Some(caller.session_id));
            }
        };
        let deleted = self.store.delete(id, precondition, on_deleted).await;
        deleted.map_err(|error| Caller::from(caller).own_user_error(error))?;
        Ok(Response::new(pb::DeleteUserResponse {}))
    }
}

impl UserService {
    fn parse_page(
        &self,
        request: &pb::ListUsersRequest,
        scope: &PageTokenScope<'_>,
    ) -> Result<PageRequest<UserId>, FieldViolations> {
        let mut violations = FieldViolations::default();
        let params =
            PageParams { size: request.page_size, skip: request.skip, token: &request.page_token };
        let page = self.page_tokens.parse(&params, scope, &mut violations);
        violations.finish(|| page)
    }
}

fn parse_new_user(
    request: &pb::CreateUserRequest,
    clock: &Clock,
) -> Result<(NewUser, NewPassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    let username = violations.check("username", Username::parse(&request.username));
    let email = violations.check("email", Email::parse(&request.email));
    let password = NewPassword::parse(&request.password).and_then(|password| {
        let logins = [&*request.username, request.email.trim()];
        password.check_differs_from(&logins).map(|()| password)
    });
    let password = violations.check("password", password);
    violations.finish(|| {
        let user = NewUser { id: UserId::generate(clock), username: username?, email: email? };
        Some((user, password?))
    })
}

fn parse_id(field: &'static str, id: &str, caller: Caller) -> Result<UserId, FieldViolations> {
    caller.resolve_user_id(id).map_err(|invalid| FieldViolations::single(field, invalid))
}

struct UserUpdate {
    id: UserId,
    precondition: Precondition,
    patch: UserPatch,
}

fn parse_update(
    request: pb::UpdateUserRequest,
    caller: Caller,
) -> Result<UserUpdate, FieldViolations> {
    let mut violations = FieldViolations::default();
    let mask = request.update_mask.as_ref();
    let Some(user) = request.user else {
        violations.add("user", REQUIRED);
        let writable = [("username", true), ("email", true)];
        violations.check("update_mask", UpdateMask::parse(mask, writable));
        return Err(violations);
    };
    let id = violations.check("user.id", caller.resolve_user_id(&user.id));
    let writable = [("username", !user.username.is_empty()), ("email", !user.email.is_empty())];
    let mask = violations.check("update_mask", UpdateMask::parse(mask, writable));
    let contains = |field| mask.as_ref().is_some_and(|mask| mask.contains(field));
    let username = contains("username")
        .then(|| violations.check("user.username", Username::parse(&user.username)))
        .flatten();
    let email = contains("email")
        .then(|| violations.check("user.email", Email::parse(&user.email)))
        .flatten();
    violations.finish(|| {
        let patch = UserPatch { username, email };
        Some(UserUpdate { id: id?, precondition: Precondition::parse(&user.etag), patch })
    })
}

fn require_self(id: UserId, caller: Caller) -> Result<(), Error> {
    if id == caller.user_id { Ok(()) } else { Err(Error::NotEnoughPermissions) }
}

/// Returns the user as the caller may see it: without the email of another user.
fn visible_to(caller: Caller, user: User) -> User {
    if user.id == caller.user_id { user } else { user.redact_email() }
}

impl From<User> for proto::user::v1::User {
    fn from(user: User) -> Self {
        Self {
            id: user.id.to_string(),
            username: user.username,
            email: user.email,
            create_time: Some(to_timestamp(user.id.create_time())),
            update_time: Some(to_timestamp(user.updated_at)),
            etag: etag::encode(user.version),
        }
    }
}
