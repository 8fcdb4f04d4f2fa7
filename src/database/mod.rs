//! The database: connecting, the pool, migrations, errors, and batching.

pub(crate) mod batch;
pub(crate) mod connect;
pub(crate) mod errors;
mod health;
pub(crate) mod incarnation;
pub(crate) mod migrate;
mod pool;
mod state;
pub(crate) mod url;

use std::time::{Duration, Instant};

use deadpool::{
    Runtime,
    managed::{Object, Pool, PoolError, QueueMode, TimeoutType, Timeouts},
};
use scopeguard::ScopeGuard;
use sqlx::{
    Arguments, Connection, PgConnection,
    postgres::{PgArguments, PgConnectOptions},
};
use tokio::{runtime::Handle, task::JoinSet, time::timeout};

use self::{
    connect::CONNECT_TIMEOUT,
    errors::{is_connection_error, is_read_only},
    pool::{Manager, PooledConnection},
};
use crate::{
    rpc::error::Error,
    telemetry::traces::{DatabaseSpan, TraceContext},
    types::clock::Clock,
};

pub(crate) use self::health::HealthCheck;

/// How long a call waits for a connection: a fraction of the call timeout, so that the error
/// still reaches the client.
///
/// Test: `a_call_waits_for_a_connection_for_a_part_of_its_deadline`.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the statement of a dropped call may take before its connection is closed.
///
/// Test: `a_cancelled_call_holds_its_connection_for_five_seconds_at_most`.
const CANCELLED_QUERY_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// Creates a pool without connections. Needs a runtime, on which it closes those that are
    /// not used.
    pub(crate) fn new(options: PgConnectOptions, max_connections: usize) -> Result<Self, Error> {
        let pool = Pool::builder(Manager::new(url::with_application_name(options)))
            .max_size(max_connections)
            // The newest first: it is the least likely to be broken.
            .queue_mode(QueueMode::Lifo)
            .wait_timeout(Some(ACQUIRE_TIMEOUT))
            .create_timeout(Some(CONNECT_TIMEOUT))
            .runtime(Runtime::Tokio1)
            .build()
            .map_err(Error::internal)?;
        tokio::spawn(pool::close_unused(pool.weak()));
        Ok(Self { pool })
    }

    /// Returns the clock of all times in the rows. It follows the database's with each connection
    /// that opens, and with each health check.
    pub(crate) fn clock(&self) -> &Clock {
        self.pool.manager().clock()
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
        self.run_guarded((), work).await
    }

    /// Does the same as [`Self::run`], and drops `guard` when no statement of the work is in
    /// progress any more, also if the future is dropped.
    pub(crate) async fn run_guarded<T>(
        &self,
        guard: impl Send + 'static,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let span = DatabaseSpan::start();
        let acquired = self.acquire().await.inspect_err(|_| span.record_error())?;
        let acquired_at = pool::acquired_at(Object::metrics(&acquired));
        let recycle = |(object, guard)| recycle_in_background(self.clone(), object, guard);
        let mut guarded = scopeguard::guard((acquired, guard), recycle);
        let PooledConnection { connection, death } = &mut *guarded.0;
        let result = tokio::select! {
            biased;
            result = work(connection) => Some(result),
            () = death.of_acquired(acquired_at) => None,
        };
        let (object, _guard) = ScopeGuard::into_inner(guarded);
        let Some(result) = result else {
            span.record_error();
            drop(Object::take(object));
            return Err(Error::DatabaseUnavailable("the connection does not answer".into()));
        };
        match &result {
            Err(Error::DatabaseUnavailable(source)) => {
                span.record_error();
                if is_connection_error(&**source) {
                    self.discard(object, is_read_only(&**source));
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

    /// Closes a broken connection, and all others: the idle ones at once, the others before their
    /// next use. They most likely are broken, too, and each would fail a call.
    ///
    /// One that is just read-only remains if new connections are the same.
    fn discard(&self, object: Object<Manager>, is_read_only: bool) {
        if self.pool.manager().distrust_like(Object::metrics(&object)) {
            self.pool.retain(|_, _| false);
        } else if is_read_only {
            return;
        }
        drop(Object::take(object));
    }

    /// Closes the connections that no call has acquired since then.
    fn discard_before(&self, instant: Instant) {
        self.pool.manager().distrust_before(instant);
        self.pool.retain(|_, metrics| pool::acquired_at(&metrics) >= instant);
    }

    /// Returns the number of connections that the pool has at most.
    #[must_use]
    pub(crate) fn max_connections(&self) -> usize {
        self.pool.status().max_size
    }

    /// Returns the number of open connections, and the number of idle ones among them.
    #[must_use]
    pub(crate) fn pool_status(&self) -> (usize, usize) {
        let status = self.pool.status();
        (status.size, status.available)
    }

    async fn acquire(&self) -> Result<Object<Manager>, Error> {
        self.pool.get().await.map_err(acquire_error)
    }

    /// Checks that a call would get a connection. If all are in use, it does not wait: calls
    /// that are slow make the database no less available.
    async fn check_pool(&self) -> Result<(), Error> {
        let timeouts = Timeouts { wait: Some(Duration::ZERO), ..self.pool.timeouts() };
        match self.pool.timeout_get(&timeouts).await {
            Ok(_) | Err(PoolError::Timeout(TimeoutType::Wait)) => Ok(()),
            // The database may have no more connections to give than the pool has.
            Err(_) if self.pool.status().size > 0 => Ok(()),
            Err(error) => Err(acquire_error(error)),
        }
    }
}

fn acquire_error(error: PoolError<sqlx::Error>) -> Error {
    match error {
        PoolError::Backend(error) => error.into(),
        PoolError::Timeout(_) => {
            Error::DatabaseUnavailable("timed out waiting for a database connection".into())
        }
        other => Error::internal(other),
    }
}

/// Starts work that continues until its end, even if the call that waits for it is dropped.
pub(crate) fn run_to_completion<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> impl Future<Output = Result<T, Error>> {
    let running = tokio::spawn(TraceContext::current().in_context(work));
    async { running.await.map_err(Error::internal)? }
}

/// Waits until the statement of a dropped call has ended, then returns its connection to the
/// pool.
fn recycle_in_background(
    database: Database,
    mut object: Object<Manager>,
    guard: impl Send + 'static,
) {
    let Ok(runtime) = Handle::try_current() else {
        return;
    };
    runtime.spawn(async move {
        let _guard = guard;
        let acquired_at = pool::acquired_at(Object::metrics(&object));
        let PooledConnection { connection, death } = &mut *object;
        let ended = tokio::select! {
            biased;
            ended = timeout(CANCELLED_QUERY_TIMEOUT, connection.ping()) => ended.ok(),
            () = death.of_acquired(acquired_at) => None,
        };
        match ended {
            Some(Ok(())) => {}
            Some(Err(error)) if is_connection_error(&error) => database.discard(object, false),
            // The error of the statement, or no answer.
            Some(Err(_)) | None => drop(Object::take(object)),
        }
    });
}
