//! `fastzero.auth.v1.AuthService`.

use std::{sync::Arc, time::Duration};

use secrecy::ExposeSecret;
use time::OffsetDateTime;
use tonic::{Request, Response, Status};

use super::{
    access_token::AccessTokens,
    authenticator::Authenticator,
    login_throttle::{Account, LoginAttempt, LoginThrottle},
    password_reset::PasswordResets,
    personal_access_tokens::{service::parse_create, tokens::PersonalAccessTokens},
    refresh_token::{RefreshToken, RefreshTokens},
    requests::{
        parse_change_password, parse_login, parse_logout_scope, parse_reset_password, required,
        session_to_proto, signing_key_to_proto, user_agent,
    },
    sessions::{Sessions, record_disabled_login},
    store::{AuthStore, Credentials, RotationOutcome},
};
use crate::{
    crypto::{
        hashing::{HashingPool, HashingThread, PasswordCheck, QueueSlot},
        password::{CandidatePassword, PasswordHash},
    },
    database::{Database, run_to_completion},
    rpc::{
        caller::{ClientIp, SessionCaller},
        error::Error,
        proto::{auth::v1 as pb, to_timestamp},
        validation::FieldViolations,
    },
    telemetry::{
        audit,
        metrics::{Counter, SessionCacheMetrics},
    },
    types::{
        id::{PersonalAccessTokenId, SessionId},
        login::LoginIdentifier,
    },
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
    resets: PasswordResets,
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
        let failed_lookups = Arc::default();
        let personal_access_tokens =
            PersonalAccessTokens::new(store.clone(), sessions.clone(), Arc::clone(&failed_lookups));
        let authenticator = Arc::new(Authenticator {
            access_tokens: parts.access_tokens,
            clock: store.clock().clone(),
            sessions: sessions.clone(),
            personal_access_tokens,
        });
        let throttle = Arc::<LoginThrottle>::default();
        let resets = PasswordResets {
            store: store.clone(),
            sessions: sessions.clone(),
            passwords: parts.passwords.clone(),
            throttle: throttle.clone(),
            failed_lookups,
        };
        Self {
            store,
            sessions,
            authenticator,
            refresh_tokens: parts.refresh_tokens,
            passwords: parts.passwords,
            throttle,
            resets,
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
        let caller = SessionCaller::from_request(&request)?;
        let scope = parse_logout_scope(request.into_inner().scope)?;
        self.sessions.end(caller, scope).await?;
        Ok(Response::new(pb::LogoutResponse {}))
    }

    async fn list_sessions(
        &self,
        request: Request<pb::ListSessionsRequest>,
    ) -> Result<Response<pb::ListSessionsResponse>, Status> {
        let caller = SessionCaller::from_request(&request)?;
        let sessions = self.sessions.list(caller.user_id).await?;
        let sessions =
            sessions.into_iter().map(|session| session_to_proto(session, caller)).collect();
        Ok(Response::new(pb::ListSessionsResponse { sessions }))
    }

    async fn revoke_session(
        &self,
        request: Request<pb::RevokeSessionRequest>,
    ) -> Result<Response<pb::RevokeSessionResponse>, Status> {
        let caller = SessionCaller::from_request(&request)?;
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
        let caller = SessionCaller::from_request(&request)?;
        let client_ip = ClientIp::from_request(&request)?;
        let (current, new) = parse_change_password(&request.into_inner())?;
        let attempt = self.throttle.admit(Account::User(caller.user_id), client_ip).await?;
        let slots = (self.passwords.try_enqueue()?, self.passwords.try_enqueue()?);
        let credentials = self.find_own_credentials(caller).await?;
        new.check_differs_from(&[&credentials.username, &credentials.email])
            .map_err(|invalid| FieldViolations::single("new_password", invalid))?;
        let verified =
            self.verify_current(credentials, client_ip, current, attempt, slots.0).await?;
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
        let active = self.authenticator.introspect(&token).await?;
        Ok(Response::new(active.map_or_else(<_>::default, pb::IntrospectTokenResponse::from)))
    }

    async fn reset_password(
        &self,
        request: Request<pb::ResetPasswordRequest>,
    ) -> Result<Response<pb::ResetPasswordResponse>, Status> {
        let client_ip = ClientIp::from_request(&request)?;
        let (code, password) = parse_reset_password(request.into_inner())?;
        self.resets.reset(&code, password, client_ip).await?;
        Ok(Response::new(pb::ResetPasswordResponse {}))
    }

    async fn create_personal_access_token(
        &self,
        request: Request<pb::CreatePersonalAccessTokenRequest>,
    ) -> Result<Response<pb::CreatePersonalAccessTokenResponse>, Status> {
        let caller = SessionCaller::from_request(&request)?;
        let client_ip = ClientIp::from_request(&request)?;
        let (details, current) = parse_create(&request.into_inner(), self.store.clock().now())?;
        let attempt = self.throttle.admit(Account::User(caller.user_id), client_ip).await?;
        let slot = self.passwords.try_enqueue()?;
        let credentials = self.find_own_credentials(caller).await?;
        let verified = self.verify_current(credentials, client_ip, current, attempt, slot).await?;
        let (token, text) =
            self.authenticator.personal_access_tokens.create(caller, verified, details).await?;
        Ok(Response::new(pb::CreatePersonalAccessTokenResponse {
            personal_access_token: Some(token.into()),
            secret: text.expose_secret().to_owned(),
        }))
    }

    async fn list_personal_access_tokens(
        &self,
        request: Request<pb::ListPersonalAccessTokensRequest>,
    ) -> Result<Response<pb::ListPersonalAccessTokensResponse>, Status> {
        let caller = SessionCaller::from_request(&request)?;
        let tokens = self.authenticator.personal_access_tokens.list(caller.user_id).await?;
        let personal_access_tokens = tokens.into_iter().map(Into::into).collect();
        Ok(Response::new(pb::ListPersonalAccessTokensResponse { personal_access_tokens }))
    }

    async fn revoke_personal_access_token(
        &self,
        request: Request<pb::RevokePersonalAccessTokenRequest>,
    ) -> Result<Response<pb::RevokePersonalAccessTokenResponse>, Status> {
        let caller = SessionCaller::from_request(&request)?;
        let id = PersonalAccessTokenId::parse(&request.into_inner().id)
            .map_err(|invalid| FieldViolations::single("id", invalid))?;
        self.authenticator.personal_access_tokens.revoke(caller, id).await?;
        Ok(Response::new(pb::RevokePersonalAccessTokenResponse {}))
    }

    async fn list_signing_keys(
        &self,
        _request: Request<pb::ListSigningKeysRequest>,
    ) -> Result<Response<pb::ListSigningKeysResponse>, Status> {
        let keys = self.authenticator.published_keys();
        let keys = keys.into_iter().map(signing_key_to_proto).collect();
        Ok(Response::new(pb::ListSigningKeysResponse { keys }))
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
            if credentials.is_disabled {
                return Err(record_disabled_login(credentials.user_id));
            }
            Ok(credentials)
        })
        .await
    }

    async fn find_own_credentials(&self, caller: SessionCaller) -> Result<Credentials, Error> {
        let credentials = self.store.find_credentials_by_id(caller.user_id).await?;
        credentials.ok_or(Error::SessionRevoked)
    }

    /// Verifies the caller's current password.
    async fn verify_current(
        &self,
        credentials: Credentials,
        client_ip: ClientIp,
        current: CandidatePassword,
        attempt: LoginAttempt,
        slot: QueueSlot,
    ) -> Result<Credentials, Error> {
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
