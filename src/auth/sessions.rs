//! The one owner of sessions: the rows in the database, the cache, and the watches of open
//! streams. Each method that ends sessions also invalidates them in the cache, and writes to
//! the audit trail, whether or not the call still waits.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use time::OffsetDateTime;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    Session,
    session_cache::SessionCache,
    store::{AuthStore, Credentials, NewSession, RevocationScope, RotationOutcome},
    token::RefreshToken,
};
use crate::{
    crypto::password::PasswordHash,
    database::run_to_completion,
    rpc::{caller::Caller, error::Error},
    telemetry::{audit, metrics::SessionCacheMetrics},
    types::{
        error_chain::ErrorChain,
        id::{SessionId, UserId},
    },
};

/// The interval in which the sessions of open streams are checked, with one statement for all. A
/// revocation on another replica ends a stream within this time.
///
/// Test: `a_stream_ends_with_its_session_on_any_replica`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// How long the check of the watched sessions may take.
///
/// Test: `a_check_of_sessions_that_hangs_is_repeated`.
const WATCH_TIMEOUT: Duration = Duration::from_secs(5);

/// The sessions of all users.
#[derive(Clone, Debug)]
pub(crate) struct Sessions(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Arc<AuthStore>,
    cache: SessionCache,
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
                async move { store.are_active(&callers).await }
            }
        });
        tokio::spawn(stop.clone().run_until_cancelled_owned(checks));
        Self(Arc::new(Inner {
            store,
            cache: SessionCache::new(metrics),
            watches,
            lifetime,
            _watcher: stop.drop_guard(),
        }))
    }

    /// Returns the number of users with cached sessions.
    #[must_use]
    pub(crate) fn cached_users(&self) -> usize {
        self.0.cache.len()
    }

    /// Returns `true` if the caller's session is active.
    pub(super) async fn is_active(&self, caller: Caller) -> Result<bool, Error> {
        let lookup = || self.0.store.time_left_of_session(caller);
        self.0.cache.is_active(caller, lookup).await
    }

    /// Drops what is known of a user's sessions, after they ended or may have ended.
    pub(crate) fn invalidate(&self, user_id: UserId) {
        self.0.cache.invalidate(user_id);
        self.0.watches.check_now.notify_one();
    }

    /// Watches the caller's session for an open stream.
    pub(crate) fn watch(&self, caller: Caller) -> SessionWatch {
        self.0.watches.add(caller)
    }

    /// Opens a session for the user whose password was verified. Returns its first refresh token
    /// and the time when it expires.
    ///
    /// # Errors
    /// [`Error::IncorrectCredentials`] if the password changed, or the user was deleted, in the
    /// meantime.
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
            opened?.ok_or(Error::IncorrectCredentials)?;
            audit::record("login", Some(session.user_id), Some(session.id));
            let caller = Caller { user_id: session.user_id, session_id: session.id };
            Ok((RefreshToken { caller, generation: 0 }, session.expires_at))
        })
        .await
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
    pub(super) async fn end(&self, caller: Caller, scope: RevocationScope) -> Result<(), Error> {
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
        caller: Caller,
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

/// The watched sessions, each with the number of its streams.
#[derive(Debug, Default)]
struct Watches {
    sessions: Mutex<HashMap<Caller, (CancellationToken, usize)>>,
    /// Asks for a check at once.
    check_now: Notify,
}

/// The watch of one stream over its session.
#[derive(Debug)]
pub(crate) struct SessionWatch {
    caller: Caller,
    ended: CancellationToken,
    watches: Arc<Watches>,
}

impl SessionWatch {
    /// Waits until the session has ended.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }
}

impl Drop for SessionWatch {
    fn drop(&mut self) {
        let mut sessions = self.watches.lock();
        if let Some((_, streams)) = sessions.get_mut(&self.caller) {
            *streams -= 1;
            if *streams == 0 {
                sessions.remove(&self.caller);
            }
        }
    }
}

impl Watches {
    fn add(self: &Arc<Self>, caller: Caller) -> SessionWatch {
        let mut sessions = self.lock();
        let (ended, streams) = sessions.entry(caller).or_default();
        *streams += 1;
        SessionWatch { caller, ended: ended.clone(), watches: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Caller, (CancellationToken, usize)>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks the watched sessions every [`WATCH_INTERVAL`], and at once when asked to. Without
    /// watches, it looks up nothing. `lookup` returns whether each session is active.
    async fn check_until_dropped<F>(self: Arc<Self>, lookup: impl Fn(Vec<Caller>) -> F)
    where
        F: Future<Output = Result<Vec<bool>, Error>>,
    {
        loop {
            tokio::select! {
                () = sleep(WATCH_INTERVAL) => {}
                () = self.check_now.notified() => {}
            }
            let callers: Vec<_> = self.lock().keys().copied().collect();
            if callers.is_empty() {
                continue;
            }
            match timeout(WATCH_TIMEOUT, lookup(callers.clone())).await {
                Ok(Ok(active)) => self.end_inactive(&callers, &active),
                // The streams stay open: an unavailable database ends no session.
                Ok(Err(error)) => {
                    tracing::debug!(error = %ErrorChain(&error), "failed to check sessions");
                }
                Err(error) => tracing::debug!(%error, "failed to check sessions"),
            }
        }
    }

    fn end_inactive(&self, callers: &[Caller], active: &[bool]) {
        let sessions = self.lock();
        for (caller, is_active) in callers.iter().zip(active) {
            if !is_active && let Some((ended, _)) = sessions.get(caller) {
                ended.cancel();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_check_of_sessions_that_hangs_is_repeated() {
        let watches = Arc::<Watches>::default();
        let caller = Caller { user_id: UserId::any(), session_id: SessionId::any() };
        let watch = watches.add(caller);
        let lookups = AtomicUsize::new(0);
        let lookup = |callers: Vec<Caller>| {
            let hangs = lookups.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                if hangs {
                    pending::<()>().await;
                }
                Ok(vec![false; callers.len()])
            }
        };
        let started = Instant::now();
        let ended = timeout(Duration::from_mins(1), watch.ended());
        tokio::select! {
            () = watches.check_until_dropped(lookup) => {}
            ended = ended => ended.expect("the second check ends the session"),
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    }
}
