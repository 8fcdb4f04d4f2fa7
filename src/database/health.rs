//! The check behind the health service.

use scopeguard::ScopeGuard;
use sqlx::PgConnection;
use tokio::time::timeout;

use super::{Database, migrate::is_schema_current, pool::PING_TIMEOUT};
use crate::{telemetry::health::ReadinessCheck, types::error_chain::BoxError};

/// A check whether calls can work: that the database has the schema and accepts writes, over a
/// connection of its own, and that the pool has a connection or gets one.
///
/// The connection of its own is for a pool that is used up: calls that wait for the pool must
/// not make the service look unavailable.
#[derive(Debug)]
pub(crate) struct HealthCheck {
    database: Database,
    connection: Option<PgConnection>,
}

impl HealthCheck {
    /// Creates a check without a connection.
    #[must_use]
    pub(crate) fn new(database: Database) -> Self {
        Self { database, connection: None }
    }

    /// A pooler or a firewall may have closed the connection since the last check, so only a
    /// new connection proves the database unavailable. After a check that failed or was
    /// dropped, the next one opens a new connection, and those of the pool are closed.
    async fn check_database(&mut self) -> Result<bool, BoxError> {
        let database = self.database.clone();
        let mut guard = scopeguard::guard(self.connection.take(), |_| database.discard_all());
        if let Some(connection) = guard.as_mut() {
            let is_current = timeout(PING_TIMEOUT, is_schema_current(connection)).await;
            if let Ok(Ok(is_current)) = is_current {
                check_writable(connection).await?;
                self.connection = ScopeGuard::into_inner(guard);
                return Ok(is_current);
            }
            database.discard_all();
        }
        let connection = guard.insert(database.pool.manager().connect().await?);
        let is_current = is_schema_current(connection).await?;
        check_writable(connection).await?;
        self.connection = ScopeGuard::into_inner(guard);
        Ok(is_current)
    }
}

/// Rejects a standby, and a database that an operator made read-only.
async fn check_writable(connection: &mut PgConnection) -> Result<(), BoxError> {
    let is_read_only: bool =
        sqlx::query_scalar("select current_setting('transaction_read_only')::boolean")
            .fetch_one(connection)
            .await?;
    if is_read_only { Err("the database is read-only".into()) } else { Ok(()) }
}

impl ReadinessCheck for HealthCheck {
    async fn check(&mut self) -> Result<bool, BoxError> {
        let is_current = self.check_database().await?;
        self.database.check_pool().await?;
        Ok(is_current)
    }
}
