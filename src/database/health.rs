//! The check behind the health service.

use scopeguard::ScopeGuard;
use sqlx::PgConnection;
use tokio::time::timeout;

use super::{
    Database,
    clock_skew::{ClockReading, ClockSkew},
    migrate::is_schema_current,
    pool::PING_TIMEOUT,
};
use crate::{
    telemetry::health::ReadinessCheck,
    types::{clock, error_chain::BoxError},
};

/// A check whether calls can work: that the database has the schema and accepts writes, over a
/// connection of its own, and that the pool has a connection or gets one.
///
/// The connection of its own is for a pool that is used up: calls that wait for the pool must
/// not make the service look unavailable.
#[derive(Debug)]
pub(crate) struct HealthCheck {
    database: Database,
    connection: Option<PgConnection>,
    clock_skew: ClockSkew,
}

impl HealthCheck {
    /// Creates a check without a connection.
    #[must_use]
    pub(crate) fn new(database: Database) -> Self {
        Self { database, connection: None, clock_skew: ClockSkew::default() }
    }

    /// A pooler or a firewall may have closed the connection since the last check, so only a
    /// new connection proves the database unavailable. After a check that failed or was
    /// dropped, the next one opens a new connection, and those of the pool are closed.
    async fn check_database(&mut self) -> Result<bool, BoxError> {
        let database = self.database.clone();
        let mut guard = scopeguard::guard(self.connection.take(), |_| database.discard_all());
        if let Some(connection) = guard.as_mut() {
            if let Ok(Ok(state)) = timeout(PING_TIMEOUT, DatabaseState::read(connection)).await {
                self.connection = ScopeGuard::into_inner(guard);
                self.clock_skew.check(state.clock);
                return state.check();
            }
            database.discard_all();
        }
        let connection = guard.insert(database.pool.manager().connect().await?);
        let state = DatabaseState::read(connection).await?;
        self.connection = ScopeGuard::into_inner(guard);
        self.clock_skew.check(state.clock);
        state.check()
    }
}

/// What the service needs of its database.
struct DatabaseState {
    /// A standby is read-only, and a database that an operator made so.
    is_read_only: bool,
    is_schema_current: bool,
    clock: ClockReading,
}

impl DatabaseState {
    async fn read(connection: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let now = || clock::to_micros(clock::now());
        let before = now();
        let (is_read_only, database) = sqlx::query_as(
            "select current_setting('transaction_read_only')::boolean,
                 (extract(epoch from clock_timestamp()) * 1000000)::bigint",
        )
        .fetch_one(&mut *connection)
        .await?;
        let clock = ClockReading { before, database, after: now() };
        let is_schema_current = is_schema_current(connection).await?;
        Ok(Self { is_read_only, is_schema_current, clock })
    }

    /// Returns whether the schema is current.
    fn check(&self) -> Result<bool, BoxError> {
        if self.is_read_only {
            return Err("the database is read-only".into());
        }
        Ok(self.is_schema_current)
    }
}

impl ReadinessCheck for HealthCheck {
    async fn check(&mut self) -> Result<bool, BoxError> {
        let is_current = self.check_database().await?;
        self.database.check_pool().await?;
        Ok(is_current)
    }
}
