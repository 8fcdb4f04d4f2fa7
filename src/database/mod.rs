//! The database: connecting, the pool, migrations, errors, and batching.
//!
//! The pool is deadpool's with an empty recycle, not sqlx's own, which pings each connection
//! when a call returns it: with the ping, GetTodo costs PostgreSQL 38 to 78 µs instead of 23
//! to 31, and reaches 8,000 to 14,000 calls a second instead of 20,000 to 25,000 (two cores,
//! 8 connections with 8 calls in flight each).

pub(crate) mod batch;
pub(crate) mod connect;
pub(crate) mod errors;
pub(crate) mod migrate;
pub(crate) mod url;

use std::{fmt, time::Duration};

use deadpool::{
    Runtime,
    managed::{self, Metrics, Object, Pool, PoolError, RecycleResult},
};
use scopeguard::ScopeGuard;
use sqlx::{
    Arguments, ConnectOptions, Connection, PgConnection,
    postgres::{PgArguments, PgConnectOptions},
};
use tokio::{runtime::Handle, task::JoinSet, time::timeout};

use self::{connect::CONNECT_TIMEOUT, errors::is_connection_error, migrate::is_schema_current};
use crate::{
    rpc::error::Error,
    telemetry::{
        health::ReadinessCheck,
        traces::{DatabaseSpan, TraceContext},
    },
    types::error_chain::BoxError,
};

/// How long a call waits for a connection: a fraction of the call timeout, so that the error
/// still reaches the client.
///
/// Test: `a_call_waits_for_a_connection_for_a_part_of_its_deadline`.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the statement of a dropped call may take before its connection is closed.
///
/// Test: `a_cancelled_call_holds_its_connection_for_five_seconds_at_most`.
const CANCELLED_QUERY_TIMEOUT: Duration = Duration::from_secs(5);

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

/// Creates the arguments of a statement with room for `count` values: without it, each of their
/// buffers grows several times.
pub(crate) fn arguments(count: usize) -> PgArguments {
    /// What IDs, numbers, times and short texts need, in bytes.
    const VALUE_CAPACITY: usize = 24;
    let mut arguments = PgArguments::default();
    arguments.reserve(count, count * VALUE_CAPACITY);
    arguments
}

/// A pool of connections.
#[derive(Clone, Debug)]
pub(crate) struct Database {
    pool: Pool<Manager>,
}

impl Database {
    /// Creates a pool without connections.
    pub(crate) fn new(options: PgConnectOptions, max_connections: usize) -> Result<Self, Error> {
        let options = options.application_name("fast-zero");
        let pool = Pool::builder(Manager { options })
            .max_size(max_connections)
            .wait_timeout(Some(ACQUIRE_TIMEOUT))
            .create_timeout(Some(CONNECT_TIMEOUT))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(Error::internal)?;
        Ok(Self { pool })
    }

    /// Opens all connections, so that no call has to wait for one to open. One is enough to
    /// succeed: the database may have no more to give.
    pub(crate) async fn warm_up(&self) -> Result<(), Error> {
        let mut opening = JoinSet::new();
        for _ in 0..self.pool.status().max_size {
            let database = self.clone();
            opening.spawn(async move { database.acquire().await });
        }
        // The pool gets them back together: otherwise one would be acquired twice.
        let opened = opening.join_all().await;
        if opened.iter().any(Result::is_ok) {
            return Ok(());
        }
        opened.into_iter().next().map_or(Ok(()), |first| first.map(drop))
    }

    /// Runs work on a connection.
    ///
    /// The caller may drop the future at any await. A statement that was sent runs on, and its
    /// connection returns to the pool afterwards. Several statements that belong together go
    /// through [`run_to_completion`].
    pub(crate) async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let span = DatabaseSpan::start();
        let acquired = self.acquire().await.inspect_err(|_| span.record_error())?;
        let mut connection = scopeguard::guard(acquired, recycle_in_background);
        let result = work(&mut connection).await;
        let object = ScopeGuard::into_inner(connection);
        match &result {
            Err(Error::DatabaseUnavailable(source)) => {
                span.record_error();
                if is_connection_error(&**source) {
                    drop(Object::take(object));
                    self.discard_idle();
                }
            }
            // A statement may still be in progress.
            Err(Error::Internal(_) | Error::DeadlineExceeded) => {
                span.record_error();
                drop(Object::take(object));
            }
            _ => {}
        }
        result
    }

    /// Closes all idle connections. If one is broken, the others most likely are, too, and each
    /// would fail a call.
    pub(crate) fn discard_idle(&self) {
        self.pool.retain(|_, _| false);
    }

    /// Returns the number of open connections, and the number of idle ones among them.
    #[must_use]
    pub(crate) fn pool_status(&self) -> (usize, usize) {
        let status = self.pool.status();
        (status.size, status.available)
    }

    async fn acquire(&self) -> Result<Object<Manager>, Error> {
        self.pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) => error.into(),
            PoolError::Timeout(_) => {
                Error::DatabaseUnavailable("timed out waiting for a database connection".into())
            }
            other => Error::internal(other),
        })
    }
}

/// Starts work that continues until its end, even if the call that waits for it is dropped.
pub(crate) fn run_to_completion<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> impl Future<Output = Result<T, Error>> {
    let running = tokio::spawn(TraceContext::current().in_context(work));
    async { running.await.map_err(Error::internal)? }
}

/// The check behind the health service, over a connection of its own: calls that wait for the
/// pool must not make the service look unavailable.
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
}

impl ReadinessCheck for HealthCheck {
    /// Returns `true` if the schema is current.
    ///
    /// A pooler or a firewall may have closed the connection since the last check, so only a
    /// new connection proves the database unavailable. After a check that failed or was
    /// dropped, the next one opens a new connection, and the pool's idle ones are closed.
    async fn check(&mut self) -> Result<bool, BoxError> {
        let database = self.database.clone();
        let mut guard = scopeguard::guard(self.connection.take(), |_| database.discard_idle());
        if let Some(connection) = guard.as_mut() {
            if let Ok(is_current) = is_schema_current(connection).await {
                self.connection = ScopeGuard::into_inner(guard);
                return Ok(is_current);
            }
            database.discard_idle();
        }
        let connection = guard.insert(database.pool.manager().connect().await?);
        let is_current = is_schema_current(connection).await?;
        self.connection = ScopeGuard::into_inner(guard);
        Ok(is_current)
    }
}

struct Manager {
    options: PgConnectOptions,
}

impl Manager {
    async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        let mut connection = self.options.connect().await?;
        sqlx::raw_sql(SESSION_SETTINGS).execute(&mut connection).await?;
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

    /// Does not ping: a ping costs each call a round trip, and a connection may break right
    /// after it.
    async fn recycle(&self, _: &mut PgConnection, _: &Metrics) -> RecycleResult<sqlx::Error> {
        Ok(())
    }
}

/// Waits until the statement of a dropped call has ended, then returns its connection to the
/// pool.
fn recycle_in_background(mut object: Object<Manager>) {
    let Ok(runtime) = Handle::try_current() else {
        return;
    };
    runtime.spawn(async move {
        let ended = timeout(CANCELLED_QUERY_TIMEOUT, object.ping()).await;
        if !matches!(ended, Ok(Ok(()))) {
            drop(Object::take(object));
        }
    });
}
