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

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use deadpool::managed::{self, Metrics, RecycleError, RecycleResult, WeakPool};
use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::clock;
use crate::types::clock::Clock;

/// The settings of each session. The timeouts are longer than any call, so that they end only
/// statements that no call waits for. A statement sets them, because a connection pooler such
/// as PgBouncer rejects them among the startup parameters.
///
/// All statements are prepared and use generic plans: planning a list at each call would cost
/// more than running it.
///
/// Test: `the_session_settings_limit_statements_locks_and_idle_transactions`.
const SESSION_SETTINGS: &str = "set statement_timeout = '10s'; \
                                set lock_timeout = '5s'; \
                                set idle_in_transaction_session_timeout = '10s'; \
                                set plan_cache_mode = force_generic_plan";

/// How long after its last use a connection is used again without a ping. A ping costs a round
/// trip, which a call that comes alone does not notice.
///
/// Test: `an_idle_connection_is_pinged_and_an_old_one_closed`.
const MAX_IDLE_WITHOUT_PING: Duration = Duration::from_millis(100);

/// How long a ping may take: what a broken connection costs one call.
///
/// Test: `a_silent_connection_delays_one_call_by_a_second`.
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a connection may be idle: less than the shortest idle timeout of common firewalls
/// and load balancers, 4 minutes (Azure; AWS has 350 seconds).
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

/// Whether a call may use a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trust {
    Full,
    AfterPing,
    None,
}

impl Trust {
    fn of(metrics: &Metrics, distrusted_at: Instant, now: Instant) -> Self {
        let last_used = metrics.recycled.unwrap_or(metrics.created);
        let idle = now.saturating_duration_since(last_used);
        let age = now.saturating_duration_since(metrics.created);
        if last_used < distrusted_at || idle > MAX_IDLE || age > MAX_LIFETIME {
            Self::None
        } else if idle > MAX_IDLE_WITHOUT_PING {
            Self::AfterPing
        } else {
            Self::Full
        }
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
    /// Connections that were not used since are closed before they are used again.
    distrusted_at: Mutex<Instant>,
    clock: Clock,
}

impl Manager {
    pub(super) fn new(options: PgConnectOptions) -> Self {
        Self { options, distrusted_at: Mutex::new(Instant::now()), clock: Clock::default() }
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Closes the connections that are open now, each before its next use.
    pub(super) fn distrust(&self) {
        *self.distrusted_at.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn trust(&self, metrics: &Metrics) -> Trust {
        let distrusted_at = *self.distrusted_at.lock().unwrap_or_else(PoisonError::into_inner);
        Trust::of(metrics, distrusted_at, Instant::now())
    }

    pub(super) async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        let mut connection = self.options.connect().await?;
        sqlx::raw_sql(SESSION_SETTINGS).execute(&mut connection).await?;
        // The database may be another one than before, after a failover.
        clock::synchronize(&self.clock, &mut connection).await?;
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
    type Type = PgConnection;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<PgConnection, sqlx::Error> {
        // Boxed, because it is rare and large: each call would carry its size.
        Box::pin(self.connect()).await
    }

    async fn recycle(
        &self,
        connection: &mut PgConnection,
        metrics: &Metrics,
    ) -> RecycleResult<sqlx::Error> {
        match self.trust(metrics) {
            Trust::Full => return Ok(()),
            Trust::None => return Err(RecycleError::message("the connection is not trusted")),
            Trust::AfterPing => {}
        }
        if matches!(timeout(PING_TIMEOUT, connection.ping()).await, Ok(Ok(()))) {
            return Ok(());
        }
        self.distrust();
        Err(RecycleError::message("the connection is broken"))
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
            assert_eq!(Trust::of(&metrics, start, now), trust, "{used:?}, {now:?}");
        }
    }

    #[test]
    fn connections_from_before_a_broken_one_are_closed() {
        let start = Instant::now();
        let unused = Metrics { created: start, recycled: None, recycle_count: 0 };
        let later = start + Duration::from_millis(1);
        assert_eq!(Trust::of(&unused, start, later), Trust::Full);
        assert_eq!(Trust::of(&unused, later, later), Trust::None);
    }
}
