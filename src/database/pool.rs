//! The pool of connections.
//!
//! It is deadpool's, not sqlx's own, which pings each connection when a call returns it: with the
//! ping, GetTodo costs PostgreSQL 38 to 78 µs instead of 23 to 31, and reaches 8,000 to 14,000
//! calls a second instead of 20,000 to 25,000 (two cores, 8 connections with 8 calls in flight
//! each). Here, a connection in use is not pinged.
//!
//! A connection may break without a word: a firewall forgets it, a server fails, an operator ends
//! the session. So the newest is used first, an idle one is pinged before its next use and closed
//! before firewalls forget it, and one that is broken makes all others suspect.
//!
//! A connection in use gives no sign: its statement may just be slow. It counts as dead if another
//! one, a pooled connection or that of the health check, has not answered since the statement
//! began, while a new one works.

use std::{
    fmt, future,
    ops::{Deref, DerefMut},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use deadpool::managed::{self, Metrics, RecycleError, RecycleResult, WeakPool};
use sqlx::{ConnectOptions, Connection, PgConnection, Row, postgres::PgConnectOptions};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, sleep_until, timeout},
};

use crate::types::clock::Clock;

/// The settings of each session, and the clock: one round trip. The timeouts are longer than any
/// call, so that they end only statements that no call waits for. A statement sets them, because a
/// connection pooler such as PgBouncer rejects them among the startup parameters. It is not
/// prepared, because a pooler may give the session to others.
///
/// All statements are prepared and use generic plans: planning a list at each call would cost
/// more than running it.
///
/// Test: `the_session_settings_limit_statements_locks_and_idle_transactions`.
const START_SESSION: &str = "set statement_timeout = '10s'; \
                             set lock_timeout = '5s'; \
                             set idle_in_transaction_session_timeout = '10s'; \
                             set plan_cache_mode = force_generic_plan; \
                             select (extract(epoch from clock_timestamp()) * 1000000)::bigint";

/// How long after a call acquired it a connection is used again without a ping. A ping costs a
/// round trip, which a call that comes alone does not notice.
///
/// Test: `an_idle_connection_is_pinged_and_an_old_one_closed`.
const MAX_IDLE_WITHOUT_PING: Duration = Duration::from_millis(100);

/// How long a ping may take: what a broken connection costs one call.
///
/// Test: `a_silent_connection_delays_one_call_by_a_second`.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// How long ago the last call may have acquired a connection: less than the shortest idle timeout
/// of common firewalls and load balancers, 4 minutes (Azure; AWS has 350 seconds).
///
/// Test: `an_idle_connection_is_pinged_and_an_old_one_closed`.
const MAX_IDLE: Duration = Duration::from_mins(3);

/// How long a connection is used, so that replicas follow a change of the host's address or of
/// the role's settings.
///
/// Test: `an_idle_connection_is_pinged_and_an_old_one_closed`.
const MAX_LIFETIME: Duration = Duration::from_mins(30);

/// The interval in which unused connections are closed.
const CLOSE_INTERVAL: Duration = Duration::from_secs(30);

/// How often calls that fail may close the other connections. New ones may fail alike, for example
/// to a database that is read-only.
///
/// Test: `writes_to_a_read_only_database_leave_the_connections_open`.
const MIN_DISTRUST_INTERVAL: Duration = Duration::from_secs(1);

/// Whether a call may use a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    Full,
    AfterPing,
    None,
}

impl Trust {
    fn of(metrics: &Metrics, distrusted_at: Option<Instant>, now: Instant) -> Self {
        let acquired_at = acquired_at(metrics);
        let idle = now.saturating_duration_since(acquired_at);
        let age = now.saturating_duration_since(metrics.created);
        if Some(acquired_at) < distrusted_at || idle > MAX_IDLE || age > MAX_LIFETIME {
            Self::None
        } else if idle > MAX_IDLE_WITHOUT_PING {
            Self::AfterPing
        } else {
            Self::Full
        }
    }
}

/// Returns when a call last acquired a connection.
pub(super) fn acquired_at(metrics: &Metrics) -> Instant {
    metrics.recycled.unwrap_or(metrics.created)
}

/// A connection, and what makes it count as dead while it is in use.
#[derive(Debug)]
pub(super) struct PooledConnection {
    pub(super) connection: PgConnection,
    pub(super) death: Death,
}

impl Deref for PooledConnection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for PooledConnection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

/// The moment up to which connections were acquired that are dead if they are still in use.
#[derive(Debug)]
pub(super) struct Death(watch::Receiver<Instant>);

impl Death {
    /// Waits until a connection that a call acquired then counts as dead.
    pub(super) async fn of_acquired(&mut self, acquired_at: Instant) {
        while self.0.changed().await.is_ok() {
            if acquired_at < *self.0.borrow_and_update() {
                return;
            }
        }
        future::pending::<()>().await;
    }
}

/// The answer of a connection, or a connection that replaces it.
pub(super) enum Outcome<A, R> {
    Answer(A),
    Replacement(R),
}

/// Waits for an answer that a connection owes since then. After [`PING_TIMEOUT`], waits for a
/// replacement as well: a database that stalls, and answers first, needs none.
pub(super) async fn answer_or_replacement<A, R>(
    answer: impl Future<Output = A>,
    since: Instant,
    replace: impl AsyncFnOnce() -> R,
) -> Outcome<A, R> {
    let replacement = async {
        sleep_until((since + PING_TIMEOUT).into()).await;
        // Called here, so that a limit of its own starts here.
        replace().await
    };
    tokio::select! {
        biased;
        answer = answer => Outcome::Answer(answer),
        replacement = replacement => Outcome::Replacement(replacement),
    }
}

/// Closes unused connections until the pool is dropped.
pub(super) async fn close_unused(pool: WeakPool<Manager>) {
    let mut ticks = interval(CLOSE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(pool) = pool.upgrade() else {
            return;
        };
        pool.retain(|_, metrics| pool.manager().trust(&metrics) != Trust::None);
    }
}

/// Opens the connections of the pool, and decides which of them calls may use.
pub(super) struct Manager {
    options: PgConnectOptions,
    /// Connections that no call has acquired since are closed before they are used again.
    distrusted_at: Mutex<Option<Instant>>,
    death: watch::Sender<Instant>,
    clock: Clock,
}

impl Manager {
    pub(super) fn new(options: PgConnectOptions) -> Self {
        Self {
            options,
            distrusted_at: Mutex::default(),
            death: watch::Sender::new(Instant::now()),
            clock: Clock::default(),
        }
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Closes the connections that were open then and that no call has acquired since.
    pub(super) fn distrust_before(&self, instant: Instant) {
        let mut distrusted_at = self.distrusted_at.lock().unwrap_or_else(PoisonError::into_inner);
        *distrusted_at = Some(instant).max(*distrusted_at);
    }

    /// Closes the connections that are open now, each before its next use, because one of them is
    /// broken. Returns `false` if that is no news.
    pub(super) fn distrust_like(&self, metrics: &Metrics) -> bool {
        let now = Instant::now();
        let mut distrusted_at = self.distrusted_at.lock().unwrap_or_else(PoisonError::into_inner);
        if distrusted_at.is_some_and(|at| {
            acquired_at(metrics) < at || now.saturating_duration_since(at) < MIN_DISTRUST_INTERVAL
        }) {
            return false;
        }
        *distrusted_at = Some(now);
        true
    }

    /// Gives up the connections that are in use since before a moment at which one did not answer:
    /// a new one works.
    pub(super) fn report_death(&self, silent_since: Instant) {
        self.distrust_before(silent_since);
        // A call may have acquired a dead connection for as long as that needs no ping. Twice,
        // because the connection may have died after the moment, during its round trip.
        let acquired_before = silent_since + 2 * MAX_IDLE_WITHOUT_PING;
        self.death.send_if_modified(|death| {
            let is_news = *death < acquired_before;
            if is_news {
                *death = acquired_before;
            }
            is_news
        });
    }

    fn trust(&self, metrics: &Metrics) -> Trust {
        let distrusted_at = *self.distrusted_at.lock().unwrap_or_else(PoisonError::into_inner);
        Trust::of(metrics, distrusted_at, Instant::now())
    }

    pub(super) async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        let mut connection = self.options.connect().await?;
        // The database may be another one than before, after a failover: the clock follows it.
        let reading = self.clock.start_reading();
        let row = sqlx::raw_sql(START_SESSION).fetch_one(&mut connection).await?;
        reading.finish(row.try_get(0)?);
        Ok(connection)
    }
}

/// Shows nothing: the options contain a password.
impl fmt::Debug for Manager {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Manager").finish_non_exhaustive()
    }
}

impl managed::Manager for Manager {
    type Type = PooledConnection;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<PooledConnection, sqlx::Error> {
        // Boxed, because it is rare and large: each call would carry its size.
        let connection = Box::pin(self.connect()).await?;
        Ok(PooledConnection { connection, death: Death(self.death.subscribe()) })
    }

    async fn recycle(
        &self,
        pooled: &mut PooledConnection,
        metrics: &Metrics,
    ) -> RecycleResult<sqlx::Error> {
        match self.trust(metrics) {
            Trust::Full => Ok(()),
            Trust::None => Err(RecycleError::message("the connection is not trusted")),
            Trust::AfterPing => Box::pin(self.ping_or_replace(pooled, metrics)).await,
        }
    }
}

impl Manager {
    /// Pings a connection, and replaces it if it does not answer and a new one works.
    async fn ping_or_replace(
        &self,
        pooled: &mut PooledConnection,
        metrics: &Metrics,
    ) -> RecycleResult<sqlx::Error> {
        let since = Instant::now();
        // The call has to open one itself if that takes longer.
        let replace = async || timeout(PING_TIMEOUT, self.connect()).await;
        match answer_or_replacement(pooled.connection.ping(), since, replace).await {
            Outcome::Answer(Ok(())) => Ok(()),
            Outcome::Replacement(Ok(Ok(connection))) => {
                self.report_death(since);
                pooled.connection = connection;
                Ok(())
            }
            Outcome::Answer(Err(_)) | Outcome::Replacement(_) => {
                self.distrust_like(metrics);
                Err(RecycleError::message("the connection is broken"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_connection_is_pinged_and_an_old_one_closed() {
        let start = Instant::now();
        let after = |duration: Duration| start + duration;
        for (used, now, trust) in [
            (0, 100, Trust::Full),
            (0, 101, Trust::AfterPing),
            (1_000, 1_100, Trust::Full),
            (0, 180_000, Trust::AfterPing),
            (0, 180_001, Trust::None),
            (1_799_999, 1_800_000, Trust::Full),
            (1_800_000, 1_800_001, Trust::None),
        ] {
            let [used, now] = [used, now].map(|millis| after(Duration::from_millis(millis)));
            let metrics = Metrics { created: start, recycled: Some(used), recycle_count: 1 };
            assert_eq!(Trust::of(&metrics, None, now), trust, "{used:?}, {now:?}");
        }
    }

    #[test]
    fn connections_from_before_a_broken_one_are_closed() {
        let start = Instant::now();
        let unused = Metrics { created: start, recycled: None, recycle_count: 0 };
        let later = start + Duration::from_millis(1);
        assert_eq!(Trust::of(&unused, Some(start), later), Trust::Full);
        assert_eq!(Trust::of(&unused, Some(later), later), Trust::None);
    }

    #[test]
    fn a_failure_that_is_no_news_closes_no_connection() {
        let manager = Manager::new(PgConnectOptions::new_without_pgpass());
        let acquired = |acquired_at| Metrics {
            created: acquired_at,
            recycled: Some(acquired_at),
            recycle_count: 1,
        };
        let start = Instant::now();
        assert!(manager.distrust_like(&acquired(start)), "the first failure");
        assert!(!manager.distrust_like(&acquired(start)), "the connection is closed already");
        assert!(!manager.distrust_like(&acquired(Instant::now())), "soon after the last one");
        *manager.distrusted_at.lock().expect("not poisoned") =
            start.checked_sub(MIN_DISTRUST_INTERVAL);
        assert!(manager.distrust_like(&acquired(start)), "an interval later");
    }

    #[tokio::test]
    async fn only_connections_in_use_since_a_silence_are_dead() {
        let manager = Manager::new(PgConnectOptions::new_without_pgpass());
        let silent_since = Instant::now();
        for (millis, is_dead) in [(0, true), (199, true), (200, false), (1_000, false)] {
            let mut death = Death(manager.death.subscribe());
            // An earlier one concerns nothing.
            manager.death.send_replace(silent_since);
            manager.report_death(silent_since);
            let acquired_at = silent_since + Duration::from_millis(millis);
            let died = timeout(Duration::from_millis(1), death.of_acquired(acquired_at)).await;
            assert_eq!(died.is_ok(), is_dead, "{millis}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stalled_connection_that_answers_first_is_not_replaced() {
        let after = |millis| tokio::time::sleep(Duration::from_millis(millis));
        for (answer, opens_within, is_answer) in
            [(900, 0, true), (1_400, 500, true), (1_600, 500, false), (5_000, 0, false)]
        {
            let since = tokio::time::Instant::now().into_std();
            let replace = async || timeout(PING_TIMEOUT, after(opens_within)).await;
            let outcome = answer_or_replacement(after(answer), since, replace).await;
            match outcome {
                Outcome::Answer(()) => assert!(is_answer, "{answer}"),
                Outcome::Replacement(opened) => assert!(!is_answer && opened.is_ok(), "{answer}"),
            }
        }
    }
}
