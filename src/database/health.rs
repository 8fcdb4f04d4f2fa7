//! The check behind the health service.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::PgConnection;
use tokio::{sync::Mutex, time::timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Database,
    connect::CONNECT_TIMEOUT,
    errors::is_connection_error,
    pool::{Outcome, answer_or_replacement},
    state::DatabaseState,
};
use crate::{telemetry::health::ReadinessCheck, types::error_chain::BoxError};

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
    checker: Arc<Mutex<Checker>>,
    /// A check that the caller of an earlier one did not wait for. It goes on: a new connection
    /// from far away takes longer to open.
    running: Option<AbortOnDropHandle<Result<bool, BoxError>>>,
}

impl HealthCheck {
    /// Creates a check without a connection.
    #[must_use]
    pub(crate) fn new(database: Database) -> Self {
        let checker =
            Checker { database, connection: None, silent_since: None, has_warned_of_clock: false };
        Self { checker: Arc::new(Mutex::new(checker)), running: None }
    }
}

impl ReadinessCheck for HealthCheck {
    async fn check(&mut self) -> Result<bool, BoxError> {
        let running = self.running.get_or_insert_with(|| {
            let checker = self.checker.clone();
            let check = async move { checker.lock().await.check().await };
            AbortOnDropHandle::new(tokio::spawn(check))
        });
        let checked = running.await;
        self.running = None;
        checked?
    }
}

#[derive(Debug)]
struct Checker {
    database: Database,
    connection: Option<PgConnection>,
    /// Since when the connection owes an answer.
    silent_since: Option<Instant>,
    has_warned_of_clock: bool,
}

impl Checker {
    async fn check(&mut self) -> Result<bool, BoxError> {
        let is_current = self.read_state().await?.check()?;
        self.check_clock();
        self.database.check_pool().await?;
        Ok(is_current)
    }

    /// A pooler or a firewall may have closed the connection since the last check, so only a new
    /// connection proves the database unavailable. One that opens also proves that the
    /// connections of the pool are as broken as the old one.
    async fn read_state(&mut self) -> Result<DatabaseState, BoxError> {
        let Self { database, connection, .. } = self;
        let (manager, clock) = (database.pool.manager(), database.clock());
        let since = *self.silent_since.get_or_insert_with(Instant::now);
        let open = async || -> Result<_, BoxError> {
            let opened = timeout(CONNECT_TIMEOUT, async {
                let mut connection = manager.connect().await?;
                let state = DatabaseState::read(&mut connection, clock).await?;
                Ok::<_, sqlx::Error>((connection, state))
            });
            Ok(opened.await??)
        };
        let (new, state) = if let Some(connection) = connection {
            let read = DatabaseState::read(connection, clock);
            match answer_or_replacement(read, since, open).await {
                Outcome::Answer(Err(error)) if is_connection_error(&error) => {
                    let new = open().await?;
                    database.discard_before(since);
                    new
                }
                Outcome::Answer(answer) => {
                    self.silent_since = None;
                    return Ok(answer?);
                }
                Outcome::Replacement(new) => {
                    let new = new?;
                    manager.report_death(since);
                    database.discard_before(since);
                    new
                }
            }
        } else {
            open().await?
        };
        self.connection = Some(new);
        self.silent_since = None;
        Ok(state)
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

impl DatabaseState {
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
