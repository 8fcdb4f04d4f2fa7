//! Who calls, from where, and whether their session is alive.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quick_cache::sync::Cache;
use time::OffsetDateTime;
use tokio::time::Instant;
use tonic::Request;

use crate::{
    error::Error,
    metrics::SessionChecks,
    types::{
        clock,
        id::{SessionId, UserId},
    },
};

/// The user that makes a call, and the session that it is made in. Only the check of
/// an access token puts one into a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Who calls.
    pub user_id: UserId,
    /// In which session.
    pub session_id: SessionId,
}

impl Caller {
    /// The caller of a method that is not public.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Error> {
        let caller = request.extensions().get::<Self>().copied();
        caller.ok_or_else(|| Error::internal("a method that needs a caller was called without one"))
    }

    /// The user that a request names: an id, or `me` for the caller.
    pub fn resolve(&self, id: &str) -> Result<UserId, crate::types::invalid::InvalidValue> {
        if id == "me" { Ok(self.user_id) } else { UserId::parse(id) }
    }
}

/// The address that a call comes from, without the port; an IPv4 address is one even
/// on an IPv6 socket.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

impl Peer {
    /// Where a call comes from.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Error> {
        let peer = request.extensions().get::<Self>().copied();
        peer.ok_or_else(|| Error::internal("a method was called from nowhere"))
    }
}

/// For how long a session that was seen alive is taken to live without another look.
/// A revocation that another replica made is in force after this time at the latest.
pub const FRESH_FOR: Duration = Duration::from_secs(5);

/// Users whose sessions are remembered: some 300 bytes for one with a single session, 2 KiB
/// for one with as many as are remembered, so 20 MiB at the very most.
const MAX_USERS: usize = 10_000;

/// Sessions of one user that are remembered: more are rarely in use within the same few
/// seconds.
const MAX_SESSIONS_PER_USER: usize = 16;

/// The sessions that this process has looked up lately, so that most calls need no
/// look-up, and calls that need the same one at the same time share it.
///
/// Ending a session forgets all that is known of its user. A look-up that began
/// before writes into what was forgotten, so it never brings a session back to life.
#[derive(Debug)]
pub struct LiveSessions {
    users: Cache<UserId, Arc<UserSessions>>,
    checks: SessionChecks,
}

type UserSessions = Mutex<Vec<Entry>>;

#[derive(Debug)]
struct Entry {
    session_id: SessionId,
    seen: Option<Seen>,
    /// Held during the look-up. Whoever waits finds its result; if it was given up,
    /// the next one looks.
    look_up: Arc<tokio::sync::Mutex<()>>,
}

/// What a look-up found.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// When it began.
    at: Instant,
    /// When the session expires; `None` if it has ended or expired.
    expires_at: Option<OffsetDateTime>,
}

impl LiveSessions {
    /// Remembers nothing yet.
    #[must_use]
    pub fn new(checks: SessionChecks) -> Self {
        Self { users: Cache::new(MAX_USERS), checks }
    }

    /// How many users' sessions are remembered.
    #[must_use]
    pub fn users(&self) -> usize {
        self.users.len()
    }

    /// Whether the caller's session is alive. `look_up` asks the database when the
    /// session expires; `None` if it has ended.
    pub async fn is_alive(
        &self,
        caller: Caller,
        look_up: impl AsyncFnOnce() -> Result<Option<OffsetDateTime>, Error>,
    ) -> Result<bool, Error> {
        let known = || Ok::<_, std::convert::Infallible>(Arc::default());
        let Ok(sessions) = self.users.get_or_insert_with(&caller.user_id, known);
        let turn = match find(&sessions, caller.session_id) {
            Found::Fresh(seen) => return Ok(self.remembered(seen)),
            Found::Stale(turn) => turn,
        };

        let _turn = turn.lock().await;
        if let Found::Fresh(seen) = find(&sessions, caller.session_id) {
            return Ok(self.remembered(seen));
        }
        self.checks.misses.inc();
        let at = Instant::now();
        let expires_at = look_up().await?.filter(|expires_at| *expires_at > clock::now());
        let seen = Seen { at, expires_at };
        remember(&sessions, caller.session_id, seen);
        Ok(seen.is_alive())
    }

    fn remembered(&self, seen: Seen) -> bool {
        self.checks.hits.inc();
        seen.is_alive()
    }

    /// Forgets all sessions of a user, to be called after one or all of them ended.
    pub fn forget(&self, user_id: UserId) {
        self.users.remove(&user_id);
    }
}

impl Seen {
    /// A session that has expired since may have been refreshed before.
    fn is_fresh(self) -> bool {
        let has_expired = self.expires_at.is_some_and(|expires_at| expires_at <= clock::now());
        self.at.elapsed() < FRESH_FOR && !has_expired
    }

    fn is_alive(self) -> bool {
        self.expires_at.is_some()
    }
}

enum Found {
    Fresh(Seen),
    Stale(Arc<tokio::sync::Mutex<()>>),
}

fn find(sessions: &UserSessions, session_id: SessionId) -> Found {
    let mut entries = lock(sessions);
    if let Some(entry) = entries.iter().find(|entry| entry.session_id == session_id) {
        return match entry.seen.filter(|seen| seen.is_fresh()) {
            Some(seen) => Found::Fresh(seen),
            None => Found::Stale(entry.look_up.clone()),
        };
    }
    if entries.len() >= MAX_SESSIONS_PER_USER {
        entries.retain(|entry| entry.seen.is_some_and(Seen::is_fresh));
    }
    if entries.len() >= MAX_SESSIONS_PER_USER {
        entries.clear();
    }
    let look_up = Arc::<tokio::sync::Mutex<()>>::default();
    entries.push(Entry { session_id, seen: None, look_up: look_up.clone() });
    Found::Stale(look_up)
}

fn remember(sessions: &UserSessions, session_id: SessionId, seen: Seen) {
    let mut entries = lock(sessions);
    if let Some(entry) = entries.iter_mut().find(|entry| entry.session_id == session_id) {
        entry.seen = Some(seen);
    }
}

fn lock(sessions: &UserSessions) -> MutexGuard<'_, Vec<Entry>> {
    sessions.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use super::*;

    fn caller() -> Caller {
        Caller { user_id: UserId::generate(), session_id: SessionId::generate() }
    }

    fn live_sessions() -> LiveSessions {
        LiveSessions::new(SessionChecks::default())
    }

    #[expect(clippy::unnecessary_wraps, reason = "what a look-up answers")]
    fn alive() -> Result<Option<OffsetDateTime>, Error> {
        Ok(Some(clock::now() + Duration::from_hours(1)))
    }

    async fn unreachable_look_up() -> Result<Option<OffsetDateTime>, Error> {
        panic!("no look-up was needed")
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_seen_alive_needs_no_second_look_for_five_seconds() {
        let (sessions, caller) = (live_sessions(), caller());
        assert!(sessions.is_alive(caller, async || alive()).await.expect("alive"));
        tokio::time::advance(FRESH_FOR.mul_f64(0.999)).await;
        assert!(sessions.is_alive(caller, unreachable_look_up).await.expect("alive"));
        tokio::time::advance(FRESH_FOR.mul_f64(0.001)).await;
        assert!(!sessions.is_alive(caller, async || Ok(None)).await.expect("looked up"));
    }

    #[tokio::test]
    async fn waiting_calls_share_one_look_up() {
        let (sessions, caller) = (Arc::new(live_sessions()), caller());
        let (look_ups, begin) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
        let calls: Vec<_> = (0..64)
            .map(|_| {
                let (sessions, look_ups, begin) =
                    (sessions.clone(), look_ups.clone(), begin.clone());
                tokio::spawn(async move {
                    let look_up = async || {
                        look_ups.fetch_add(1, Ordering::Relaxed);
                        begin.notified().await;
                        alive()
                    };
                    sessions.is_alive(caller, look_up).await
                })
            })
            .collect();
        begin.notify_one();
        for call in calls {
            assert!(call.await.expect("no panic").expect("alive"));
        }
        assert_eq!(look_ups.load(Ordering::Relaxed), 1);
        assert_eq!((sessions.checks.hits.get(), sessions.checks.misses.get()), (63, 1));
    }

    #[tokio::test]
    async fn a_look_up_that_began_before_a_revocation_does_not_revive_the_session() {
        let (sessions, caller) = (Arc::new(live_sessions()), caller());
        let (began, go_on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let early = tokio::spawn({
            let (sessions, began, go_on) = (sessions.clone(), began.clone(), go_on.clone());
            async move {
                let look_up = async || {
                    began.notify_one();
                    go_on.notified().await;
                    alive()
                };
                sessions.is_alive(caller, look_up).await
            }
        });
        began.notified().await;
        sessions.forget(caller.user_id);
        // A later call does not wait for the early look-up, and sees the revocation.
        assert!(!sessions.is_alive(caller, async || Ok(None)).await.expect("looked up"));
        go_on.notify_one();
        assert!(early.await.expect("no panic").expect("alive"), "it was alive when it began");
        assert!(!sessions.is_alive(caller, unreachable_look_up).await.expect("known"));
    }

    #[tokio::test]
    async fn a_look_up_that_is_given_up_or_fails_is_made_by_the_next_call() {
        let (sessions, caller) = (Arc::new(live_sessions()), caller());
        let began = Arc::new(Notify::new());
        let given_up = tokio::spawn({
            let (sessions, began) = (sessions.clone(), began.clone());
            async move {
                let look_up = async || {
                    began.notify_one();
                    std::future::pending().await
                };
                sessions.is_alive(caller, look_up).await
            }
        });
        began.notified().await;
        given_up.abort();
        let failing = async || Err(Error::DeadlineExceeded);
        assert!(sessions.is_alive(caller, failing).await.is_err());
        assert!(sessions.is_alive(caller, async || alive()).await.expect("alive"));
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let (sessions, user_id) = (live_sessions(), UserId::generate());
        for _ in 0..10 * MAX_SESSIONS_PER_USER {
            let caller = Caller { user_id, session_id: SessionId::generate() };
            assert!(sessions.is_alive(caller, async || alive()).await.expect("alive"));
        }
        let entries = sessions.users.get(&user_id).expect("remembered");
        assert!(lock(&entries).len() <= MAX_SESSIONS_PER_USER);
    }
}
