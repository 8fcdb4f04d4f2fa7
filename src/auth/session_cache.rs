//! The cache of active sessions, so that most calls need no lookup, and concurrent calls of one
//! session share it, also if it fails.
//!
//! Ending a session invalidates all entries of its user. A lookup that began before writes into
//! the invalidated entries, so it never revives a session.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use crate::{
    rpc::{caller::Caller, error::Error},
    telemetry::metrics::SessionCacheMetrics,
    types::id::{SessionId, UserId},
};

/// How long a cached session counts as active without another lookup. A revocation on another
/// replica takes effect within this time.
///
/// Test: `another_replica_rejects_a_revoked_session_within_five_seconds`.
pub(crate) const SESSION_CACHE_TTL: Duration = Duration::from_secs(5);

/// Users with cached sessions. One takes about 300 bytes with a single session, and 2 KiB with
/// the most sessions, so 20 MiB at most.
///
/// Test: `the_cached_users_are_bounded`.
const MAX_USERS: usize = 10_000;

/// Cached sessions of one user: more are rarely in use within the same few seconds.
///
/// Test: `the_sessions_of_a_user_are_bounded`.
const MAX_SESSIONS_PER_USER: usize = 16;

/// The sessions that this process has looked up within the TTL.
#[derive(Debug)]
pub(super) struct SessionCache {
    users: Cache<UserId, Arc<UserSessions>>,
    metrics: SessionCacheMetrics,
}

type UserSessions = Mutex<Vec<CachedSession>>;

#[derive(Debug)]
struct CachedSession {
    session_id: SessionId,
    lookup: Option<SessionLookup>,
    in_progress: Arc<InProgress>,
}

/// Held during a lookup. Calls that wait for it find the result, or else the error; if the
/// lookup was dropped, the next call looks up.
type InProgress = tokio::sync::Mutex<Option<Error>>;

/// The result of a lookup.
#[derive(Clone, Copy, Debug)]
struct SessionLookup {
    started_at: Instant,
    /// Until when the session is active; `None` if it is not.
    active_until: Option<Instant>,
}

impl SessionCache {
    /// Creates an empty cache.
    #[must_use]
    pub(super) fn new(metrics: SessionCacheMetrics) -> Self {
        Self { users: Cache::new(MAX_USERS), metrics }
    }

    /// Returns the number of users with cached sessions.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.users.len()
    }

    /// Returns `true` if the caller's session is active. `lookup` returns how long it
    /// still is, or `None` if it is not.
    pub(super) async fn is_active(
        &self,
        caller: Caller,
        lookup: impl AsyncFnOnce() -> Result<Option<Duration>, Error>,
    ) -> Result<bool, Error> {
        let empty = || Ok::<_, std::convert::Infallible>(Arc::default());
        let Ok(sessions) = self.users.get_or_insert_with(&caller.user_id, empty);
        let in_progress = match find(&sessions, caller.session_id) {
            CacheEntry::Hit(cached) => return Ok(self.hit(cached)),
            CacheEntry::Miss(in_progress) => in_progress,
        };

        let mut failure = in_progress.lock().await;
        // One after another, the lookups of waiting calls would exceed their deadlines.
        if let Some(error) = &*failure {
            return Err(error.duplicate());
        }
        if let CacheEntry::Hit(cached) = find(&sessions, caller.session_id) {
            return Ok(self.hit(cached));
        }
        self.metrics.misses.inc();
        let started_at = Instant::now();
        let active_for = lookup().await.inspect_err(|error| {
            *failure = Some(error.duplicate());
            // Calls that come later do not wait for this lookup.
            lock(&sessions).retain(|entry| !Arc::ptr_eq(&entry.in_progress, &in_progress));
        })?;
        let active_until = active_for.map(|active_for| Instant::now() + active_for);
        let result = SessionLookup { started_at, active_until };
        insert(&sessions, caller.session_id, result);
        Ok(result.is_active())
    }

    fn hit(&self, cached: SessionLookup) -> bool {
        self.metrics.hits.inc();
        cached.is_active()
    }

    /// Removes all sessions of a user, after one of them ended.
    pub(super) fn invalidate(&self, user_id: UserId) {
        self.users.remove(&user_id);
    }
}

impl SessionLookup {
    /// A session that has expired since the lookup may have been refreshed before.
    fn is_fresh(self) -> bool {
        let now = Instant::now();
        let has_expired = self.active_until.is_some_and(|until| until <= now);
        now.duration_since(self.started_at) < SESSION_CACHE_TTL && !has_expired
    }

    fn is_active(self) -> bool {
        self.active_until.is_some()
    }
}

enum CacheEntry {
    Hit(SessionLookup),
    Miss(Arc<InProgress>),
}

fn find(sessions: &UserSessions, session_id: SessionId) -> CacheEntry {
    let mut entries = lock(sessions);
    if let Some(entry) = entries.iter().find(|entry| entry.session_id == session_id) {
        return match entry.lookup.filter(|lookup| lookup.is_fresh()) {
            Some(lookup) => CacheEntry::Hit(lookup),
            None => CacheEntry::Miss(entry.in_progress.clone()),
        };
    }
    if entries.len() >= MAX_SESSIONS_PER_USER {
        entries.retain(|entry| entry.lookup.is_some_and(SessionLookup::is_fresh));
    }
    if entries.len() >= MAX_SESSIONS_PER_USER {
        entries.clear();
    }
    let in_progress = Arc::<InProgress>::default();
    entries.push(CachedSession { session_id, lookup: None, in_progress: in_progress.clone() });
    CacheEntry::Miss(in_progress)
}

fn insert(sessions: &UserSessions, session_id: SessionId, lookup: SessionLookup) {
    let mut entries = lock(sessions);
    if let Some(entry) = entries.iter_mut().find(|entry| entry.session_id == session_id) {
        entry.lookup = Some(lookup);
    }
}

fn lock(sessions: &UserSessions) -> MutexGuard<'_, Vec<CachedSession>> {
    sessions.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::{sync::Notify, task::JoinSet};

    use super::*;

    fn caller() -> Caller {
        Caller { user_id: UserId::any(), session_id: SessionId::any() }
    }

    fn cache() -> SessionCache {
        SessionCache::new(SessionCacheMetrics::default())
    }

    #[expect(clippy::unnecessary_wraps, reason = "the type of a lookup")]
    fn active() -> Result<Option<Duration>, Error> {
        Ok(Some(Duration::from_hours(1)))
    }

    async fn unexpected_lookup() -> Result<Option<Duration>, Error> {
        panic!("the cache needs no lookup")
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_needs_one_lookup_per_ttl() {
        let (sessions, caller) = (cache(), caller());
        assert!(sessions.is_active(caller, async || active()).await.expect("active"));
        tokio::time::advance(SESSION_CACHE_TTL.mul_f64(0.999)).await;
        assert!(sessions.is_active(caller, unexpected_lookup).await.expect("active"));
        tokio::time::advance(SESSION_CACHE_TTL.mul_f64(0.001)).await;
        assert!(!sessions.is_active(caller, async || Ok(None)).await.expect("looked up"));
    }

    #[tokio::test]
    async fn concurrent_calls_share_one_lookup() {
        let (sessions, caller) = (Arc::new(cache()), caller());
        let (lookups, begin) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let calls: Vec<_> = (0..64)
            .map(|_| {
                let (sessions, lookups, begin) = (sessions.clone(), lookups.clone(), begin.clone());
                tokio::spawn(async move {
                    let lookup = async || {
                        lookups.fetch_add(1, Ordering::Relaxed);
                        begin.notified().await;
                        active()
                    };
                    sessions.is_active(caller, lookup).await
                })
            })
            .collect();
        begin.notify_one();
        for call in calls {
            assert!(call.await.expect("no panic").expect("active"));
        }
        assert_eq!(lookups.load(Ordering::Relaxed), 1);
        assert_eq!((sessions.metrics.hits.get(), sessions.metrics.misses.get()), (63, 1));
    }

    #[tokio::test]
    async fn a_lookup_that_began_before_a_revocation_does_not_revive_the_session() {
        let (sessions, caller) = (Arc::new(cache()), caller());
        let (began, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let early = tokio::spawn({
            let (sessions, began, go_on) = (sessions.clone(), began.clone(), go_on.clone());
            async move {
                let lookup = async || {
                    began.notify_one();
                    go_on.notified().await;
                    active()
                };
                sessions.is_active(caller, lookup).await
            }
        });
        began.notified().await;
        sessions.invalidate(caller.user_id);
        // A later call does not wait for the early lookup, and sees the revocation.
        assert!(!sessions.is_active(caller, async || Ok(None)).await.expect("looked up"));
        go_on.notify_one();
        assert!(
            early.await.expect("no panic").expect("active"),
            "it was active when the lookup began"
        );
        assert!(!sessions.is_active(caller, unexpected_lookup).await.expect("known"));
    }

    #[tokio::test]
    async fn the_next_call_repeats_a_lookup_that_failed_or_was_dropped() {
        let (sessions, caller) = (Arc::new(cache()), caller());
        let began = Arc::new(Notify::new());
        let dropped = tokio::spawn({
            let (sessions, began) = (sessions.clone(), began.clone());
            async move {
                let lookup = async || {
                    began.notify_one();
                    std::future::pending().await
                };
                sessions.is_active(caller, lookup).await
            }
        });
        began.notified().await;
        dropped.abort();
        let failing = async || Err(Error::DeadlineExceeded);
        assert!(sessions.is_active(caller, failing).await.is_err());
        assert!(sessions.is_active(caller, async || active()).await.expect("active"));
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_wait_for_a_lookup_that_fails_fail_with_it() {
        let (sessions, caller) = (Arc::new(cache()), caller());
        let lookups = Arc::new(AtomicUsize::new(0));
        let started = Instant::now();
        let calls = (0..10).map(|_| {
            let (sessions, lookups) = (sessions.clone(), lookups.clone());
            async move {
                let lookup = async || {
                    lookups.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_secs(2)).await;
                    Err(Error::DatabaseUnavailable("timed out".into()))
                };
                sessions.is_active(caller, lookup).await
            }
        });
        for result in calls.collect::<JoinSet<_>>().join_all().await {
            let error = result.expect_err("the lookup failed");
            assert!(matches!(error, Error::DatabaseUnavailable(_)), "{error:?}");
        }
        assert_eq!(started.elapsed(), Duration::from_secs(2));
        assert_eq!(lookups.load(Ordering::Relaxed), 1);
        assert!(sessions.is_active(caller, async || active()).await.expect("active"));
    }

    #[tokio::test]
    async fn the_cached_users_are_bounded() {
        let sessions = cache();
        for _ in 0..2 * MAX_USERS {
            assert!(sessions.is_active(caller(), async || active()).await.expect("active"));
        }
        assert!(sessions.len() <= MAX_USERS, "{}", sessions.len());
    }

    #[tokio::test]
    async fn the_sessions_of_a_user_are_bounded() {
        let (sessions, user_id) = (cache(), UserId::any());
        for _ in 0..10 * MAX_SESSIONS_PER_USER {
            let caller = Caller { user_id, session_id: SessionId::any() };
            assert!(sessions.is_active(caller, async || active()).await.expect("active"));
        }
        let entries = sessions.users.get(&user_id).expect("cached");
        assert!(lock(&entries).len() <= MAX_SESSIONS_PER_USER);
    }
}
