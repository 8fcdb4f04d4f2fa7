//! The check behind the health service.

use std::time::Duration;

use scopeguard::ScopeGuard;
use sqlx::PgConnection;
use tokio::time::timeout;

use super::{
    Database, clock, migrate::is_schema_current, pool::PING_TIMEOUT, privileges::missing_privileges,
};
use crate::{
    telemetry::health::ReadinessCheck,
    types::{clock::Clock, error_chain::BoxError},
};

/// How far the system clock may be from that of the database before the log warns. The service
/// corrects any difference, but what else runs on the host may not.
///
/// Test: `replicas_with_different_clocks_agree_about_sessions`.
const MAX_CLOCK_ERROR: Duration = Duration::from_secs(5);

/// A check whether calls can work: that the database has the schema, accepts writes and grants the
/// role what they need, over a connection of its own, and that the pool has a connection or gets
/// one.
///
/// The connection of its own is for a pool that is used up: calls that wait for the pool must
/// not make the service look unavailable.
#[derive(Debug)]
pub(crate) struct HealthCheck {
    database: Database,
    connection: Option<PgConnection>,
    has_warned_of_clock: bool,
}

impl HealthCheck {
    /// Creates a check without a connection.
    #[must_use]
    pub(crate) fn new(database: Database) -> Self {
        Self { database, connection: None, has_warned_of_clock: false }
    }

    /// A pooler or a firewall may have closed the connection since the last check, so only a
    /// new connection proves the database unavailable. After a check that failed or was
    /// dropped, the next one opens a new connection, and those of the pool are closed.
    async fn check_database(&mut self) -> Result<bool, BoxError> {
        let database = self.database.clone();
        let mut guard = scopeguard::guard(self.connection.take(), |_| database.discard_all());
        if let Some(connection) = guard.as_mut() {
            let read = DatabaseState::read(connection, self.database.clock());
            if let Ok(Ok(state)) = timeout(PING_TIMEOUT, read).await {
                self.connection = ScopeGuard::into_inner(guard);
                return state.check();
            }
            database.discard_all();
        }
        let connection = guard.insert(database.pool.manager().connect().await?);
        let state = DatabaseState::read(connection, self.database.clock()).await?;
        self.connection = ScopeGuard::into_inner(guard);
        state.check()
    }

    fn check_clock(&mut self) {
        let error = self.database.clock().system_clock_error();
        let has_warned = std::mem::replace(&mut self.has_warned_of_clock, error > MAX_CLOCK_ERROR);
        if error > MAX_CLOCK_ERROR && !has_warned {
            tracing::warn!(
                difference_seconds = error.as_secs_f64(),
                "system clock differs from the clock of the database"
            );
        }
    }
}

/// What the service needs of its database.
struct DatabaseState {
    /// A standby is read-only, and a database that an operator made so.
    is_read_only: bool,
    missing_privileges: Vec<String>,
    is_schema_current: bool,
}

impl DatabaseState {
    /// Reads the state, and makes the clock follow that of the database.
    async fn read(connection: &mut PgConnection, clock: &Clock) -> Result<Self, sqlx::Error> {
        clock::synchronize(clock, connection).await?;
        let is_read_only =
            sqlx::query_scalar("select current_setting('transaction_read_only')::boolean")
                .fetch_one(&mut *connection)
                .await?;
        let missing_privileges = missing_privileges(connection).await?;
        let is_schema_current = is_schema_current(connection).await?;
        Ok(Self { is_read_only, missing_privileges, is_schema_current })
    }

    /// Returns whether the schema is current.
    fn check(&self) -> Result<bool, BoxError> {
        if self.is_read_only {
            return Err("the database is read-only".into());
        }
        if !self.missing_privileges.is_empty() {
            return Err(format!("the role lacks {}", self.missing_privileges.join(", ")).into());
        }
        Ok(self.is_schema_current)
    }
}

impl ReadinessCheck for HealthCheck {
    async fn check(&mut self) -> Result<bool, BoxError> {
        let is_current = self.check_database().await?;
        self.check_clock();
        self.database.check_pool().await?;
        Ok(is_current)
    }
}
