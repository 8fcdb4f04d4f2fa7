//! `fastzero.auth.v1.AuthService`.

use std::{sync::Arc, time::Duration};

use http::header::USER_AGENT;
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use super::{
    LoginIdentifier, MAX_USER_AGENT_LEN, Session,
    authenticator::Authenticator,
    login_throttle::{Account, LoginAttempt, LoginThrottle},
    sessions::Sessions,
    store::{AuthStore, Credentials, RevocationScope, RotationOutcome},
    token::{AccessTokens, RefreshToken, RefreshTokens},
};
use crate::{
    crypto::{
        hashing::{HashingPool, HashingThread, PasswordCheck, QueueSlot},
        password::{CandidatePassword, NewPassword, PasswordHash},
    },
    database::{Database, run_to_completion},
    rpc::{
        caller::{Caller, ClientIp},
        error::Error,
        proto::{auth::v1 as pb, to_timestamp},
        validation::{FieldViolations, REQUIRED},
    },
    telemetry::{
        audit,
        metrics::{Counter, SessionCacheMetrics},
    },
    types::{id::SessionId, invalid::InvalidValue},
};

/// The implementation of `AuthService`.
#[derive(Clone, Debug)]
pub(crate) struct AuthService {
    store: Arc<AuthStore>,
    sessions: Sessions,
    authenticator: Arc<Authenticator>,
    refresh_tokens: RefreshTokens,
    passwords: HashingPool,
    throttle: Arc<LoginThrottle>,
    password_failures: Counter,
}

/// The parts of authentication that `server` provides.
#[derive(Debug)]
pub(crate) struct AuthParts {
    pub(crate) database: Database,
    pub(crate) batching: bool,
    /// The longest time for which a batched query waits.
    pub(crate) query_deadline: Duration,
    pub(crate) access_tokens: AccessTokens,
    pub(crate) refresh_tokens: RefreshTokens,
    /// How long a session lasts after its last rotation.
    pub(crate) session_lifetime: time::Duration,
    pub(crate) passwords: HashingPool,
    pub(crate) password_failures: Counter,
    pub(crate) session_cache: SessionCacheMetrics,
}

impl AuthService {
    /// Creates the service. Needs a runtime.
    pub(crate) fn new(parts: AuthParts) -> Self {
        let store = AuthStore::new(parts.database, parts.batching, parts.query_deadline);
        let store = Arc::new(store);
        let sessions = Sessions::new(store.clone(), parts.session_lifetime, parts.session_cache);
        let authenticator = Arc::new(Authenticator {
            access_tokens: parts.access_tokens,
            clock: store.clock().clone(),
            sessions: sessions.clone(),
        });
        Self {
            store,
            sessions,
            authenticator,
            refresh_tokens: parts.refresh_tokens,
            passwords: parts.passwords,
            throttle: Arc::default(),
            password_failures: parts.password_failures,
        }
    }

    /// Returns the authenticator of all methods.
    pub(crate) fn authenticator(&self) -> Arc<Authenticator> {
        self.authenticator.clone()
    }

    /// Returns the owner of the sessions.
    pub(crate) fn sessions(&self) -> Sessions {
        self.sessions.clone()
    }
}

#[tonic::async_trait]
impl pb::auth_service_server::AuthService for AuthService {
    async fn login(
        &self,
        request: Request<pb::LoginRequest>,
    ) -> Result<Response<pb::LoginResponse>, Status> {
        let (user_agent, client_ip) = (user_agent(&request), ClientIp::from_request(&request)?);
        let (login, password) = parse_login(&request.into_inner())?;
        let verified = self.verify_login(&login, password, client_ip).await?;
        let now = self.store.clock().now();
        let peer = client_ip.ip.to_string();
        let (token, expires_at) = self.sessions.open(verified, user_agent, peer, now).await?;
        let tokens = Some(self.issue_tokens(token, expires_at, now)?);
        Ok(Response::new(pb::LoginResponse { tokens }))
    }

    async fn refresh_token(
        &self,
        request: Request<pb::RefreshTokenRequest>,
    ) -> Result<Response<pb::RefreshTokenResponse>, Status> {
        let token = required("refresh_token", request.into_inner().refresh_token)?;
        let token = self.refresh_tokens.verify(&token).ok_or(Error::RefreshTokenInvalid)?;
        let tokens = Some(self.rotate(token).await?);
        Ok(Response::new(pb::RefreshTokenResponse { tokens }))
    }

    async fn logout(
        &self,
        request: Request<pb::LogoutRequest>,
    ) -> Result<Response<pb::LogoutResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let scope = parse_logout_scope(request.into_inner().scope)?;
        self.sessions.end(caller, scope).await?;
        Ok(Response::new(pb::LogoutResponse {}))
    }

    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let sessions = self.sessions.list(caller.user_id).await?;
        let sessions =
            sessions.into_iter().map(|session| session_to_proto(session, caller)).collect();
        Ok(Response::new(pb::ListSessionsResponse { sessions }))
    }

    async fn revoke_session(
        &self,
        request: Request<pb::RevokeSessionRequest>,
    ) -> Result<Response<pb::RevokeSessionResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let session_id = SessionId::parse(&request.into_inner().session_id)
            .map_err(|invalid| FieldViolations::single("session_id", invalid))?;
        if !self.sessions.revoke(caller.user_id, session_id).await? {
            return Err(Error::SessionNotFound.into());
        }
        Ok(Response::new(pb::RevokeSessionResponse {}))
    }

    async fn change_password(
        &self,
        request: Request<pb::ChangePasswordRequest>,
    ) -> Result<Response<pb::ChangePasswordResponse>, Status> {
        let caller = Caller::from_request(&request)?;
        let client_ip = ClientIp::from_request(&request)?;
        let (current, new) = parse_change_password(&request.into_inner())?;
        let attempt = self.throttle.admit(Account::User(caller.user_id), client_ip).await?;
        let slots = (self.passwords.try_enqueue()?, self.passwords.try_enqueue()?);
        let verified =
            self.verify_current(caller, client_ip, current, &new, attempt, slots.0).await?;
        let hash = slots.1.hash(new).await?;
        // Another change may have come first: then the verified password is not the current one.
        if !self.sessions.change_password(caller, verified, hash).await? {
            return Err(Error::IncorrectCredentials.into());
        }
        Ok(Response::new(pb::ChangePasswordResponse {}))
    }

    async fn introspect_token(
        &self,
        request: Request<pb::IntrospectTokenRequest>,
    ) -> Result<Response<pb::IntrospectTokenResponse>, Status> {
        let token = required("access_token", request.into_inner().access_token)?;
        let response = match self.authenticator.verify_access_token(&token).await {
            Ok(verified) => pb::IntrospectTokenResponse {
                active: true,
                user_id: verified.caller.user_id.to_string(),
                session_id: verified.caller.session_id.to_string(),
                expire_time: Some(to_timestamp(verified.expires_at)),
            },
            Err(Error::TokenInvalid | Error::TokenExpired { .. } | Error::SessionRevoked) => {
                pb::IntrospectTokenResponse::default()
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Response::new(response))
    }
}

impl AuthService {
    /// Verifies the password of a login, with the same work whether the account exists or not.
    async fn verify_login(
        &self,
        login: &LoginIdentifier,
        password: CandidatePassword,
        client_ip: ClientIp,
    ) -> Result<Credentials, Error> {
        // Wait for the throttle before joining the hashing queue: waiting logins must not occupy
        // queue slots.
        let attempt = self.throttle.admit(Account::Login(login), client_ip).await?;
        let slot = self.passwords.try_enqueue()?;
        // Boxed, so that only logins with a slot take the memory for the rest.
        Box::pin(self.verify_and_rehash(login, password, attempt, slot)).await
    }

    async fn verify_and_rehash(
        &self,
        login: &LoginIdentifier,
        password: CandidatePassword,
        attempt: LoginAttempt,
        slot: QueueSlot,
    ) -> Result<Credentials, Error> {
        let credentials = self.store.find_credentials(login).await?;
        let (service, thread) = (self.clone(), slot.wait_for_thread().await?);
        run_to_completion(async move {
            let stored = credentials.as_ref();
            let rehashed = service.verify_password(thread, password, stored, attempt).await?;
            let credentials = credentials.ok_or(Error::IncorrectCredentials)?;
            if let Some(hash) = rehashed {
                service.store.update_password_hash(&credentials, &hash).await?;
            }
            Ok(credentials)
        })
        .await
    }

    /// Verifies the caller's current password for a change of it.
    async fn verify_current(
        &self,
        caller: Caller,
        client_ip: ClientIp,
        current: CandidatePassword,
        new: &NewPassword,
        attempt: LoginAttempt,
        slot: QueueSlot,
    ) -> Result<Credentials, Error> {
        let credentials = self.store.find_credentials_by_id(caller.user_id).await?;
        let credentials = credentials.ok_or(Error::SessionRevoked)?;
        new.check_differs_from(&[&credentials.username, &credentials.email])
            .map_err(|invalid| FieldViolations::single("new_password", invalid))?;
        let (service, thread) = (self.clone(), slot.wait_for_thread().await?);
        run_to_completion(async move {
            let verified =
                service.verify_password(thread, current, Some(&credentials), attempt).await;
            if let Err(Error::IncorrectCredentials) = verified {
                for login in [&credentials.username, &credentials.email] {
                    let login = LoginIdentifier::parse(login);
                    service.throttle.record_failure_for(Account::Login(&login), client_ip);
                }
            }
            verified.map(|_| credentials)
        })
        .await
    }

    /// Verifies a password and records the outcome. Returns a new hash if the argon2 parameters
    /// have changed since the stored one.
    ///
    /// The caller runs it to completion: a client that disconnects would otherwise guess, and
    /// make the server hash, without being counted.
    async fn verify_password(
        &self,
        thread: HashingThread,
        password: CandidatePassword,
        credentials: Option<&Credentials>,
        attempt: LoginAttempt,
    ) -> Result<Option<PasswordHash>, Error> {
        let stored = credentials.map(|credentials| credentials.password.clone());
        match thread.verify(password, stored).await? {
            PasswordCheck::Match { rehashed } => {
                attempt.record_success();
                Ok(rehashed)
            }
            PasswordCheck::Mismatch => {
                let user_id = credentials.map(|credentials| credentials.user_id);
                audit::record("login_failed", user_id, None);
                self.password_failures.inc();
                if attempt.record_failure() {
                    audit::record("login_locked", user_id, None);
                }
                Err(Error::IncorrectCredentials)
            }
        }
    }

    async fn rotate(&self, token: RefreshToken) -> Result<pb::TokenSet, Error> {
        let (caller, now) = (token.caller, self.store.clock().now());
        match self.sessions.rotate(token, now).await? {
            RotationOutcome::Successor { generation, expires_at } => {
                self.issue_tokens(RefreshToken { caller, generation }, expires_at, now)
            }
            RotationOutcome::Reused => Err(Error::RefreshTokenReused),
            RotationOutcome::Expired => Err(Error::RefreshTokenExpired),
            RotationOutcome::SessionNotFound => Err(Error::RefreshTokenInvalid),
        }
    }

    fn issue_tokens(
        &self,
        refresh_token: RefreshToken,
        session_expires_at: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<pb::TokenSet, Error> {
        let caller = refresh_token.caller;
        let (access_token, expires_at) = self.authenticator.access_tokens.issue(caller, now)?;
        Ok(pb::TokenSet {
            access_token,
            token_type: "Bearer".to_owned(),
            access_token_expire_time: Some(to_timestamp(expires_at)),
            refresh_token: self.refresh_tokens.issue(refresh_token),
            refresh_token_expire_time: Some(to_timestamp(session_expires_at)),
            session_id: caller.session_id.to_string(),
        })
    }
}

/// Returns the `user-agent` of a login, cut to [`MAX_USER_AGENT_LEN`].
fn user_agent<T>(request: &Request<T>) -> String {
    let user_agent = request.metadata().as_ref().get(USER_AGENT);
    let user_agent = user_agent.map(|value| String::from_utf8_lossy(value.as_bytes()));
    user_agent.unwrap_or_default().chars().take(MAX_USER_AGENT_LEN).collect()
}

fn parse_login(
    request: &pb::LoginRequest,
) -> Result<(LoginIdentifier, CandidatePassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    if request.login.trim().is_empty() {
        violations.add("login", REQUIRED);
    }
    if request.password.is_empty() {
        violations.add("password", REQUIRED);
    }
    violations.finish(|| {
        let login = LoginIdentifier::parse(&request.login);
        Some((login, CandidatePassword::new(&request.password)))
    })
}

fn parse_change_password(
    request: &pb::ChangePasswordRequest,
) -> Result<(CandidatePassword, NewPassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    if request.current_password.is_empty() {
        violations.add("current_password", REQUIRED);
    }
    let current = CandidatePassword::new(&request.current_password);
    let new = NewPassword::parse(&request.new_password).and_then(|new| {
        if new.equals(&current) {
            Err(InvalidValue::new("must not be the current password"))
        } else {
            Ok(new)
        }
    });
    let new = violations.check("new_password", new);
    violations.finish(|| Some((current, new?)))
}

fn parse_logout_scope(number: i32) -> Result<RevocationScope, FieldViolations> {
    match pb::LogoutScope::try_from(number) {
        Ok(pb::LogoutScope::Unspecified | pb::LogoutScope::ThisSession) => {
            Ok(RevocationScope::This)
        }
        Ok(pb::LogoutScope::OtherSessions) => Ok(RevocationScope::Others),
        Ok(pb::LogoutScope::AllSessions) => Ok(RevocationScope::All),
        Err(_) => {
            let allowed = InvalidValue::new("must be THIS_SESSION, OTHER_SESSIONS or ALL_SESSIONS");
            Err(FieldViolations::single("scope", allowed))
        }
    }
}

fn required(field: &'static str, value: String) -> Result<String, FieldViolations> {
    if value.is_empty() {
        return Err(FieldViolations::single(field, REQUIRED));
    }
    Ok(value)
}

fn session_to_proto(session: Session, caller: Caller) -> pb::Session {
    pb::Session {
        id: session.id.to_string(),
        create_time: Some(to_timestamp(session.id.create_time())),
        last_used_time: Some(to_timestamp(session.rotated_at)),
        expire_time: Some(to_timestamp(session.expires_at)),
        user_agent: session.user_agent,
        peer: session.peer,
        current: session.id == caller.session_id,
    }
}
