//! The rpcs on sessions, tokens and passwords.

use std::sync::Arc;

use http::header::USER_AGENT;
use time::{Duration, OffsetDateTime};
use tonic::{Request, Response, Status};

use super::{
    LoginName, MAX_USER_AGENT_LENGTH, NewSession, Session,
    attempts::{self, Account, Attempts},
    guard::Authenticator,
    store::{self, Credentials, Ending, Rotation},
    token::{RefreshToken, RefreshTokens},
};
use crate::{
    audit,
    caller::{Caller, Peer},
    database::{Database, complete},
    error::Error,
    metrics::Counter,
    password::{Attempt, Hasher, NewPassword, PasswordHash, Place, Turn, Verdict},
    proto::{auth::v1 as pb, timestamp},
    types::{clock, id::SessionId, invalid::InvalidValue},
    validation::{FieldViolations, REQUIRED},
};

/// Implements `fastzero.auth.v1.AuthService`.
#[derive(Clone, Debug)]
pub struct AuthService {
    /// Where sessions are kept.
    pub database: Database,
    /// Checks passwords.
    pub hasher: Hasher,
    /// Counts passwords that were wrong.
    pub attempts: Arc<Attempts>,
    /// Checks access tokens, and makes them.
    pub authenticator: Arc<Authenticator>,
    /// Makes and reads refresh tokens.
    pub refresh_tokens: RefreshTokens,
    /// How long a session lives without being refreshed.
    pub session_lifetime: Duration,
    /// Counts wrong passwords for the metrics.
    pub logins_failed: Counter,
}

#[tonic::async_trait]
impl pb::auth_service_server::AuthService for AuthService {
    async fn login(
        &self,
        request: Request<pb::LoginRequest>,
    ) -> Result<Response<pb::LoginResponse>, Status> {
        let (user_agent, peer) = (user_agent(&request), Peer::of(&request)?);
        let (name, attempt) = parse_login(&request.into_inner())?;
        let verified = self.verify(&name, attempt, peer).await?;
        let service = self.clone();
        let peer = peer.0.to_string();
        let tokens = complete(async move { service.open(&verified, user_agent, peer).await });
        Ok(Response::new(pb::LoginResponse { tokens: Some(tokens.await?) }))
    }

    async fn refresh_token(
        &self,
        request: Request<pb::RefreshTokenRequest>,
    ) -> Result<Response<pb::RefreshTokenResponse>, Status> {
        let token = required("refresh_token", request.into_inner().refresh_token)?;
        let token = self.refresh_tokens.read(&token).ok_or(Error::RefreshTokenInvalid)?;
        let service = self.clone();
        let tokens = complete(async move { service.refresh(token).await });
        Ok(Response::new(pb::RefreshTokenResponse { tokens: Some(tokens.await?) }))
    }

    async fn logout(
        &self,
        request: Request<pb::LogoutRequest>,
    ) -> Result<Response<pb::LogoutResponse>, Status> {
        let caller = Caller::of(&request)?;
        let which = parse_scope(request.into_inner().scope)?;
        let service = self.clone();
        complete(async move {
            let ended = service
                .database
                .run(async |connection| store::end(connection, caller, which).await)
                .await;
            // Where the answer was lost, too: it may have happened.
            service.authenticator.live_sessions.forget(caller.user_id);
            ended?;
            // All of them, or all others, are not named.
            let session_id = (which == Ending::This).then_some(caller.session_id);
            audit::record("session_revoked", Some(caller.user_id), session_id);
            Ok(())
        })
        .await?;
        Ok(Response::new(pb::LogoutResponse {}))
    }

    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let sessions = self
            .database
            .run(async |connection| store::list(connection, caller.user_id, clock::now()).await)
            .await?;
        let sessions = sessions.into_iter().map(|session| session_of(session, caller)).collect();
        Ok(Response::new(pb::ListSessionsResponse { sessions }))
    }

    async fn revoke_session(
        &self,
        request: Request<pb::RevokeSessionRequest>,
    ) -> Result<Response<pb::RevokeSessionResponse>, Status> {
        let caller = Caller::of(&request)?;
        let session_id = SessionId::parse(&request.into_inner().session_id)
            .map_err(|invalid| FieldViolations::single("session_id", invalid))?;
        let service = self.clone();
        complete(async move {
            let (user_id, now) = (caller.user_id, clock::now());
            let revoked = service
                .database
                .run(async |connection| store::revoke(connection, user_id, session_id, now).await)
                .await;
            service.authenticator.live_sessions.forget(user_id);
            if !revoked? {
                return Err(Error::SessionNotFound);
            }
            audit::record("session_revoked", Some(user_id), Some(session_id));
            Ok(())
        })
        .await?;
        Ok(Response::new(pb::RevokeSessionResponse {}))
    }

    async fn change_password(
        &self,
        request: Request<pb::ChangePasswordRequest>,
    ) -> Result<Response<pb::ChangePasswordResponse>, Status> {
        let (caller, peer) = (Caller::of(&request)?, Peer::of(&request)?);
        let (current, new) = parse_change(&request.into_inner())?;
        let counted = self.attempts.begin(Account::Own(caller.user_id), peer).await?;
        let (verify, hash) = (self.hasher.admit()?, self.hasher.admit()?);
        let credentials = self
            .database
            .run(async |connection| store::find_own_credentials(connection, caller.user_id).await)
            .await?
            .ok_or(Error::SessionRevoked)?;
        new.check_differs_from(&[&credentials.username, &credentials.email])
            .map_err(|invalid| FieldViolations::single("new_password", invalid))?;
        let (service, turn) = (self.clone(), verify.turn().await?);
        let check = async move {
            let checked = service.check(turn, current, Some(&credentials), counted).await;
            if let Err(Error::IncorrectCredentials) = checked {
                for name in [&credentials.username, &credentials.email] {
                    let name = LoginName::parse(name);
                    service.attempts.add_failure(Account::Named(&name), peer);
                }
            }
            checked.map(|_| credentials)
        };
        let credentials = complete(check).await?;
        let hash = hash.hash(new).await?;

        let service = self.clone();
        complete(async move {
            let changed = service
                .database
                .run(async |connection| {
                    store::change_password(connection, caller, &credentials, &hash).await
                })
                .await;
            service.authenticator.live_sessions.forget(caller.user_id);
            if !changed? {
                // Another change came first: the password that was verified is not the
                // current one any more.
                return Err(Error::IncorrectCredentials);
            }
            audit::record("password_changed", Some(caller.user_id), Some(caller.session_id));
            Ok(())
        })
        .await?;
        Ok(Response::new(pb::ChangePasswordResponse {}))
    }

    async fn introspect_token(
        &self,
        request: Request<pb::IntrospectTokenRequest>,
    ) -> Result<Response<pb::IntrospectTokenResponse>, Status> {
        let token = required("access_token", request.into_inner().access_token)?;
        let response = match self.authenticator.check(&token, clock::now()).await {
            Ok(verified) => pb::IntrospectTokenResponse {
                active: true,
                user_id: verified.caller.user_id.to_string(),
                session_id: verified.caller.session_id.to_string(),
                expire_time: Some(timestamp(verified.expires_at)),
            },
            Err(Error::TokenInvalid | Error::TokenExpired | Error::SessionRevoked) => {
                pb::IntrospectTokenResponse::default()
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Response::new(response))
    }
}

impl AuthService {
    /// Checks a login's password, with the same work whether the user exists or not.
    async fn verify(
        &self,
        name: &LoginName,
        attempt: Attempt,
        peer: Peer,
    ) -> Result<Credentials, Error> {
        // First, so that those that wait for their turn here hold no place.
        let counted = self.attempts.begin(Account::Named(name), peer).await?;
        let place = self.hasher.admit()?;
        // On the heap, so that only those that have a place take the memory for the rest.
        Box::pin(self.look_up_and_check(name, attempt, counted, place)).await
    }

    async fn look_up_and_check(
        &self,
        name: &LoginName,
        attempt: Attempt,
        counted: attempts::Attempt,
        place: Place,
    ) -> Result<Credentials, Error> {
        let credentials = self
            .database
            .run(async |connection| store::find_credentials(connection, name).await)
            .await?;
        let (service, turn) = (self.clone(), place.turn().await?);
        complete(async move {
            let rehashed = service.check(turn, attempt, credentials.as_ref(), counted).await?;
            let credentials = credentials.ok_or(Error::IncorrectCredentials)?;
            if let Some(hash) = rehashed {
                service
                    .database
                    .run(async |connection| store::rehash(connection, &credentials, &hash).await)
                    .await?;
            }
            Ok(credentials)
        })
        .await
    }

    /// Checks a password, and counts what comes of it. To be run to its end: who goes away
    /// meanwhile would guess, and have the hash made, without being counted. A new hash of
    /// the password if its cost has changed.
    async fn check(
        &self,
        turn: Turn,
        attempt: Attempt,
        credentials: Option<&Credentials>,
        counted: attempts::Attempt,
    ) -> Result<Option<PasswordHash>, Error> {
        let stored = credentials.map(|credentials| credentials.password.clone());
        match turn.verify(attempt, stored).await? {
            Verdict::Right { rehashed } => {
                counted.succeed();
                Ok(rehashed)
            }
            Verdict::Wrong => {
                let user_id = credentials.map(|credentials| credentials.user_id);
                audit::record("login_failed", user_id, None);
                self.logins_failed.inc();
                if counted.fail() {
                    audit::record("login_locked", user_id, None);
                }
                Err(Error::IncorrectCredentials)
            }
        }
    }

    async fn open(
        &self,
        verified: &Credentials,
        user_agent: String,
        peer: String,
    ) -> Result<pb::TokenSet, Error> {
        let now = clock::now();
        let session = NewSession {
            id: SessionId::generate(),
            user_id: verified.user_id,
            now,
            expires_at: now + self.session_lifetime,
            user_agent,
            peer,
        };
        let (user_id, password_version) = (verified.user_id, verified.password_version);
        let trimmed = self
            .database
            .run(async |connection| {
                if !store::open(&mut *connection, &session, password_version).await? {
                    // The password was changed, or the user deleted, at this moment.
                    return Err(Error::IncorrectCredentials);
                }
                store::trim(connection, user_id, now).await
            })
            .await?;
        if trimmed {
            self.authenticator.live_sessions.forget(user_id);
        }
        audit::record("login", Some(user_id), Some(session.id));
        let caller = Caller { user_id, session_id: session.id };
        self.tokens(RefreshToken { caller, generation: 0 }, session.expires_at, now)
    }

    async fn refresh(&self, token: RefreshToken) -> Result<pb::TokenSet, Error> {
        let caller = token.caller;
        let now = clock::now();
        let expires_at = now + self.session_lifetime;
        let rotation = self
            .database
            .run(async |connection| {
                let rotation = store::rotate(&mut *connection, token, now, expires_at).await?;
                if rotation == Rotation::Reused {
                    store::end(connection, caller, Ending::This).await?;
                }
                Ok(rotation)
            })
            .await?;
        match rotation {
            Rotation::Successor { generation, expires_at } => {
                self.tokens(RefreshToken { caller, generation }, expires_at, now)
            }
            Rotation::Reused => {
                self.authenticator.live_sessions.forget(caller.user_id);
                tracing::warn!(
                    target: audit::TARGET,
                    event = "refresh_reused",
                    user_id = %caller.user_id,
                    session_id = %caller.session_id,
                    "a refresh token was used again; its session is revoked"
                );
                Err(Error::RefreshTokenReused)
            }
            Rotation::Expired => Err(Error::RefreshTokenExpired),
            Rotation::Ended => Err(Error::RefreshTokenInvalid),
        }
    }

    fn tokens(
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
            access_token_expire_time: Some(timestamp(expires_at)),
            refresh_token: self.refresh_tokens.make(refresh_token),
            refresh_token_expire_time: Some(timestamp(session_expires_at)),
            session_id: caller.session_id.to_string(),
        })
    }
}

/// What a login is made with.
fn user_agent<T>(request: &Request<T>) -> String {
    let user_agent = request.metadata().as_ref().get(USER_AGENT);
    let user_agent = user_agent.map(|value| String::from_utf8_lossy(value.as_bytes()));
    user_agent.unwrap_or_default().chars().take(MAX_USER_AGENT_LENGTH).collect()
}

fn parse_login(request: &pb::LoginRequest) -> Result<(LoginName, Attempt), FieldViolations> {
    let mut violations = FieldViolations::default();
    if request.login.trim().is_empty() {
        violations.add("login", REQUIRED);
    }
    if request.password.is_empty() {
        violations.add("password", REQUIRED);
    }
    violations.finish(|| Some((LoginName::parse(&request.login), Attempt::new(&request.password))))
}

fn parse_change(
    request: &pb::ChangePasswordRequest,
) -> Result<(Attempt, NewPassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    if request.current_password.is_empty() {
        violations.add("current_password", REQUIRED);
    }
    let current = Attempt::new(&request.current_password);
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

fn parse_scope(number: i32) -> Result<Ending, FieldViolations> {
    match pb::LogoutScope::try_from(number) {
        Ok(pb::LogoutScope::Unspecified | pb::LogoutScope::ThisSession) => Ok(Ending::This),
        Ok(pb::LogoutScope::OtherSessions) => Ok(Ending::Others),
        Ok(pb::LogoutScope::AllSessions) => Ok(Ending::All),
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

fn session_of(session: Session, caller: Caller) -> pb::Session {
    pb::Session {
        id: session.id.to_string(),
        create_time: Some(timestamp(session.id.create_time())),
        last_used_time: Some(timestamp(session.rotated_at)),
        expire_time: Some(timestamp(session.expires_at)),
        user_agent: session.user_agent,
        peer: session.peer,
        current: session.id == caller.session_id,
    }
}
