//! The one owner of sessions: the rows in the database, the cache, and the watches of open
//! streams. Each method that ends sessions also invalidates them in the cache, and writes to
//! the audit trail, whether or not the call still waits.
//!
//! Cache and watches also hold personal access tokens, which live and end with the same promises.

use std::sync::Arc;

use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Session,
    credential_cache::{CredentialCache, FoundCredential},
    personal_access_tokens::{StoredToken, text::TokenText},
    refresh_token::RefreshToken,
    store::{AuthStore, Credentials, NewSession, RevocationScope, RotationOutcome},
    watches::{CredentialWatch, Watches},
};
use crate::{
    crypto::password::PasswordHash,
    database::run_to_completion,
    rpc::{
        caller::{Caller, Credential, SessionCaller},
        error::Error,
    },
    telemetry::{audit, metrics::SessionCacheMetrics},
    types::id::{SessionId, UserId},
};

/// The sessions of all users.
#[derive(Clone, Debug)]
pub(crate) struct Sessions(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Arc<AuthStore>,
    cache: CredentialCache,
    watches: Arc<Watches>,
    /// How long a session lasts after its last rotation.
    lifetime: time::Duration,
    _watcher: DropGuard,
}

impl Sessions {
    /// Creates the owner of the sessions, which needs a runtime. A session lasts for `lifetime`
    /// after its last rotation.
    pub(super) fn new(
        store: Arc<AuthStore>,
        lifetime: time::Duration,
        metrics: SessionCacheMetrics,
    ) -> Self {
        let watches = Arc::<Watches>::default();
        let stop = CancellationToken::new();
        let checks = watches.clone().check_until_dropped({
            let store = store.clone();
            move |callers: Vec<_>| {
                let store = store.clone();
                async move { are_active(&store, &callers).await }
            }
        });
        tokio::spawn(stop.clone().run_until_cancelled_owned(checks));
        Self(Arc::new(Inner {
            store,
            cache: CredentialCache::new(metrics),
            watches,
            lifetime,
            _watcher: stop.drop_guard(),
        }))
    }

    /// Returns the number of users with cached credentials.
    #[must_use]
    pub(crate) fn cached_users(&self) -> usize {
        self.0.cache.len()
    }

    /// Returns `true` if the caller's session is active.
    pub(super) async fn is_active(&self, caller: SessionCaller) -> Result<bool, Error> {
        let lookup = async || {
            let time_left = self.0.store.time_left_of_session(caller).await?;
            Ok(time_left.map(|time_left| FoundCredential::Session {
                active_until: Instant::now() + time_left,
            }))
        };
        Ok(self.0.cache.find(caller.into(), lookup).await?.is_some())
    }

    /// Returns the row of a personal access token, if it is cached.
    pub(super) fn cached_token(&self, text: &TokenText) -> Option<Arc<StoredToken>> {
        stored_token(self.0.cache.get(text.caller()).flatten())
    }

    /// Returns the row of a personal access token, also if it has expired.
    pub(super) async fn find_token(
        &self,
        text: &TokenText,
    ) -> Result<Option<Arc<StoredToken>>, Error> {
        let lookup = async || {
            let found = self.0.store.find_token(text.user_id, text.id).await?;
            Ok(found.map(|token| FoundCredential::PersonalAccessToken(Arc::new(token))))
        };
        self.0.cache.find(text.caller(), lookup).await.map(stored_token)
    }

    /// Drops what is known of a user's credentials, after they ended or may have ended.
    pub(crate) fn invalidate(&self, user_id: UserId) {
        self.0.cache.invalidate(user_id);
        self.0.watches.check_now.notify_one();
    }

    /// Watches the caller's credential for an open stream.
    pub(crate) fn watch(&self, caller: Caller) -> CredentialWatch {
        self.0.watches.add(caller)
    }

    /// Opens a session for the user whose password was verified. Returns its first refresh token
    /// and the time when it expires.
    ///
    /// # Errors
    /// [`Error::IncorrectCredentials`] if the password changed, or the user was deleted, in the
    /// meantime, and [`Error::UserDisabled`] if an operator disabled the user.
    pub(super) async fn open(
        &self,
        verified: Credentials,
        user_agent: String,
        peer: String,
        now: OffsetDateTime,
    ) -> Result<(RefreshToken, OffsetDateTime), Error> {
        let this = self.clone();
        run_to_completion(async move {
            let session = NewSession {
                id: SessionId::generate(this.0.store.clock()),
                user_id: verified.user_id,
                now,
                expires_at: now + this.0.lifetime,
                user_agent,
                peer,
            };
            let opened = this.0.store.open_session(&session, verified.password_version).await;
            // Also after an error: older sessions may have been deleted.
            if !matches!(opened, Ok(None | Some(false))) {
                this.invalidate(session.user_id);
            }
            if opened?.is_none() {
                return Err(this.why_not_opened(&verified).await?);
            }
            audit::record("login", Some(session.user_id), Some(session.id));
            let caller = SessionCaller { user_id: session.user_id, session_id: session.id };
            Ok((RefreshToken { caller, generation: 0 }, session.expires_at))
        })
        .await
    }

    /// Returns why no session was opened for the user whose password was verified.
    async fn why_not_opened(&self, verified: &Credentials) -> Result<Error, Error> {
        let current = self.0.store.find_credentials_by_id(verified.user_id).await?;
        let is_same = |current: &Credentials| current.password_version == verified.password_version;
        Ok(match current.filter(is_same) {
            Some(current) if current.is_disabled => record_disabled_login(current.user_id),
            _ => Error::IncorrectCredentials,
        })
    }

    /// Rotates a refresh token. A token that was used before ends the session.
    pub(super) async fn rotate(
        &self,
        token: RefreshToken,
        now: OffsetDateTime,
    ) -> Result<RotationOutcome, Error> {
        let this = self.clone();
        run_to_completion(async move {
            let outcome = this.0.store.rotate(token, now, now + this.0.lifetime).await;
            // Also after an error: the session may have been deleted.
            if matches!(outcome, Ok(RotationOutcome::Reused) | Err(_)) {
                this.invalidate(token.caller.user_id);
            }
            let outcome = outcome?;
            if outcome == RotationOutcome::Reused {
                tracing::warn!(
                    target: audit::TARGET,
                    event = "refresh_reused",
                    user_id = %token.caller.user_id,
                    session_id = %token.caller.session_id,
                    "refresh token reuse detected, session revoked"
                );
            }
            Ok(outcome)
        })
        .await
    }

    /// Ends sessions of the caller.
    pub(super) async fn end(
        &self,
        caller: SessionCaller,
        scope: RevocationScope,
    ) -> Result<(), Error> {
        let this = self.clone();
        run_to_completion(async move {
            let ended = this.0.store.delete_sessions(caller, scope).await;
            // Also after an error: the statement may have run.
            this.invalidate(caller.user_id);
            ended?;
            // A line about several sessions names none.
            let session_id = (scope == RevocationScope::This).then_some(caller.session_id);
            audit::record("session_revoked", Some(caller.user_id), session_id);
            Ok(())
        })
        .await
    }

    /// Ends one active session of a user. Returns `true` if there was one.
    pub(super) async fn revoke(
        &self,
        user_id: UserId,
        session_id: SessionId,
    ) -> Result<bool, Error> {
        let this = self.clone();
        run_to_completion(async move {
            let now = this.0.store.clock().now();
            let revoked = this.0.store.delete_session(user_id, session_id, now).await;
            this.invalidate(user_id);
            let revoked = revoked?;
            if revoked {
                audit::record("session_revoked", Some(user_id), Some(session_id));
            }
            Ok(revoked)
        })
        .await
    }

    /// Lists a user's active sessions, newest first.
    pub(super) async fn list(&self, user_id: UserId) -> Result<Vec<Session>, Error> {
        self.0.store.list_sessions(user_id, self.0.store.clock().now()).await
    }

    /// Sets the caller's password, and ends all other sessions. Returns `false`, and changes
    /// nothing, if the password that was verified is not the current one any more.
    pub(super) async fn change_password(
        &self,
        caller: SessionCaller,
        verified: Credentials,
        hash: PasswordHash,
    ) -> Result<bool, Error> {
        let this = self.clone();
        run_to_completion(async move {
            let changed = this.0.store.change_password(caller, &verified, &hash).await;
            this.invalidate(caller.user_id);
            let changed = changed?;
            if changed {
                audit::record("password_changed", Some(caller.user_id), Some(caller.session_id));
            }
            Ok(changed)
        })
        .await
    }
}

/// Records a login of a disabled user, and returns the error for it.
pub(super) fn record_disabled_login(user_id: UserId) -> Error {
    audit::record("login_disabled", Some(user_id), None);
    Error::UserDisabled
}

fn stored_token(found: Option<FoundCredential>) -> Option<Arc<StoredToken>> {
    match found {
        Some(FoundCredential::PersonalAccessToken(token)) => Some(token),
        Some(FoundCredential::Session { .. }) | None => None,
    }
}

/// Returns which credentials are active, in order, with at most one statement for each kind. A
/// personal access token is active until it is deleted: the stream ends at its expiry by itself.
async fn are_active(store: &AuthStore, callers: &[Caller]) -> Result<Vec<bool>, Error> {
    let (mut sessions, mut tokens) = (Vec::new(), Vec::new());
    for &Caller { user_id, credential } in callers {
        match credential {
            Credential::Session(session_id) => {
                sessions.push(SessionCaller { user_id, session_id });
            }
            Credential::PersonalAccessToken(id) => tokens.push((user_id, id)),
        }
    }
    let sessions = match &*sessions {
        [] => Vec::new(),
        sessions => store.are_sessions_active(sessions).await?,
    };
    let tokens = match &*tokens {
        [] => Vec::new(),
        tokens => store.do_tokens_exist(tokens).await?,
    };
    let (mut sessions, mut tokens) = (sessions.into_iter(), tokens.into_iter());
    let active = callers.iter().map(|caller| match caller.credential {
        Credential::Session(_) => sessions.next(),
        Credential::PersonalAccessToken(_) => tokens.next(),
    });
    // Each credential has a result.
    Ok(active.map(Option::unwrap_or_default).collect())
}
