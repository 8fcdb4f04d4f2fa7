//! The database: how it is reached, waited for, migrated and used.

use std::{borrow::Cow, fmt, time::Duration};

use deadpool::{
    Runtime,
    managed::{self, Metrics, Object, Pool, PoolError, RecycleResult},
};
use scopeguard::ScopeGuard;
use sqlx::{
    ConnectOptions, Connection, PgConnection,
    migrate::{MigrateError, Migrator},
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::{
    runtime::Handle,
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    error::Error,
    health::ReadinessCheck,
    traces::{CurrentCall, DatabaseSpan},
    types::error_chain::{BoxError, ErrorChain},
};

/// The schema that this binary needs.
pub static MIGRATIONS: Migrator = Migrator { ignore_missing: true, ..sqlx::migrate!() };

/// How long a call waits for a connection: a fraction of the default deadline of 5 s,
/// so that there is time to say so.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long opening a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a connection whose call was dropped may take to finish its statement
/// before it is thrown away.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the database itself allows a statement: longer than any deadline, so that it
/// ends only what nobody waits for any more. Set by a statement, because a pooler such as
/// PgBouncer refuses them among the parameters that open a connection.
///
/// All statements are prepared and keep their plan: planning a list anew at each call
/// would cost more than running it.
const SESSION_SETTINGS: &str = "set statement_timeout = '10s'; \
                                set lock_timeout = '5s'; \
                                set idle_in_transaction_session_timeout = '10s'; \
                                set plan_cache_mode = force_generic_plan";

/// The pause after the first attempt to reach the database; it doubles up to the
/// other one.
const FIRST_RETRY_AFTER: Duration = Duration::from_millis(50);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(2);

/// The pause between two looks at a schema that somebody else brings up to date.
const SCHEMA_RETRY_AFTER: Duration = Duration::from_secs(1);

/// SQLSTATE classes that waiting does not mend: the credentials are refused, or there
/// is no such database.
const FINAL_CLASSES: [&str; 2] = ["28", "3D"];

/// Reads a database's URL. `postgres://` and `postgresql://` are the same, a driver
/// (`postgresql+psycopg://`, as SQLAlchemy writes it) is ignored. What the URL leaves
/// out comes from `PGPASSWORD` and its kin.
pub fn parse_url(url: &str) -> Result<PgConnectOptions, BoxError> {
    let (scheme, rest) = url.split_once("://").ok_or("it is no URL")?;
    let (scheme, _driver) = scheme.split_once('+').unwrap_or((scheme, ""));
    if !matches!(scheme, "postgres" | "postgresql") {
        return Err("its scheme is neither postgres nor postgresql".into());
    }
    let options: PgConnectOptions = format!("{scheme}://{rest}").parse()?;
    // Nothing here is a floating-point number, and PgBouncer refuses the parameter.
    Ok(options.extra_float_digits(None))
}

/// A few connections that calls take turns with.
#[derive(Clone, Debug)]
pub struct Database {
    pool: Pool<Manager>,
}

impl Database {
    /// Opens no connection yet.
    pub fn new(options: PgConnectOptions, max_connections: usize) -> Result<Self, Error> {
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

    /// Opens all connections, so that no call has to wait for one to open. One is enough
    /// to go on with: the database may have no more to give at the moment.
    pub async fn warm_up(&self) -> Result<(), Error> {
        let mut opening = JoinSet::new();
        for _ in 0..self.pool.status().max_size {
            let database = self.clone();
            opening.spawn(async move { database.acquire().await });
        }
        // Held until all are there: otherwise the same one would be taken twice.
        let opened = opening.join_all().await;
        if opened.iter().any(Result::is_ok) {
            return Ok(());
        }
        opened.into_iter().next().map_or(Ok(()), |first| first.map(drop))
    }

    /// Does some work on a connection.
    ///
    /// The caller may drop the call at any await. A statement that was sent runs on
    /// then, and the connection is used again when it has ended. Statements that must
    /// follow each other therefore go through [`complete`].
    pub async fn run<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let span = DatabaseSpan::begin();
        let acquired = self.acquire().await.inspect_err(|_| span.record_error())?;
        let mut connection = scopeguard::guard(acquired, settle_in_background);
        let result = work(&mut connection).await;
        let object = ScopeGuard::into_inner(connection);
        let Err(error) = &result else {
            return result;
        };
        match error {
            Error::DatabaseUnavailable(source) => {
                span.record_error();
                if is_disconnected(&**source) {
                    drop(Object::take(object));
                    self.discard_idle();
                }
            }
            // It may have been left in the middle of something.
            Error::Internal(_) | Error::DeadlineExceeded => {
                span.record_error();
                drop(Object::take(object));
            }
            _ => {}
        }
        result
    }

    /// Throws away all connections that are not in use. When one is broken, the others
    /// most likely are, too; without this, each would cost a call.
    pub fn discard_idle(&self) {
        self.pool.retain(|_, _| false);
    }

    /// How many connections are open, and how many of them no call uses.
    #[must_use]
    pub fn connections(&self) -> (usize, usize) {
        let status = self.pool.status();
        (status.size, status.available)
    }

    /// Opens a connection beside those that calls use.
    pub async fn connect(&self) -> Result<PgConnection, sqlx::Error> {
        self.pool.manager().connect().await
    }

    async fn acquire(&self) -> Result<Object<Manager>, Error> {
        self.pool.get().await.map_err(|error| match error {
            PoolError::Backend(error) => error.into(),
            PoolError::Timeout(_) => {
                Error::DatabaseUnavailable("no connection to the database in time".into())
            }
            other => Error::internal(other),
        })
    }
}

/// The check of the database behind the health service, over a connection of its own: calls
/// that wait for the pool's must not make the service look dead.
#[derive(Debug)]
pub struct HealthCheck {
    database: Database,
    connection: Option<PgConnection>,
}

impl HealthCheck {
    /// Opens no connection yet.
    #[must_use]
    pub fn new(database: Database) -> Self {
        Self { database, connection: None }
    }
}

impl ReadinessCheck for HealthCheck {
    /// Returns whether the schema has all that this binary needs. After a check that failed
    /// or was dropped, the next one begins with a new connection.
    ///
    /// A connection may have been closed since the last check, by a pooler or on the way. It
    /// is a new one that shows whether the database is there.
    async fn check(&mut self) -> Result<bool, BoxError> {
        let database = self.database.clone();
        // Given up or failed: those of calls most likely do not work, either.
        let mut guard = scopeguard::guard(self.connection.take(), |_| database.discard_idle());
        if let Some(open) = guard.as_mut() {
            if let Ok(is_ready) = is_migrated(open).await {
                self.connection = ScopeGuard::into_inner(guard);
                return Ok(is_ready);
            }
            database.discard_idle();
        }
        let new = guard.insert(database.connect().await?);
        let is_ready = is_migrated(new).await?;
        self.connection = ScopeGuard::into_inner(guard);
        Ok(is_ready)
    }
}

/// Begins work that runs to its end even if the call that wants it is dropped meanwhile.
pub fn complete<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> impl Future<Output = Result<T, Error>> {
    let running = tokio::spawn(CurrentCall::get().around(work));
    async { running.await.map_err(Error::internal)? }
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

/// The options would show a password.
impl fmt::Debug for Manager {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Manager").finish_non_exhaustive()
    }
}

impl managed::Manager for Manager {
    type Type = PgConnection;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<PgConnection, sqlx::Error> {
        // It is rare, and what it keeps meanwhile is large: every call would carry it.
        Box::pin(self.connect()).await
    }

    /// No ping: it would cost each call a round trip, and a connection may break right
    /// after it all the same.
    async fn recycle(&self, _: &mut PgConnection, _: &Metrics) -> RecycleResult<sqlx::Error> {
        Ok(())
    }
}

/// For a connection whose call was given up: waits for the end of its statement, and
/// gives it back to the pool.
fn settle_in_background(mut object: Object<Manager>) {
    let Ok(runtime) = Handle::try_current() else {
        return;
    };
    runtime.spawn(async move {
        let settled = timeout(SETTLE_TIMEOUT, object.ping()).await;
        if !matches!(settled, Ok(Ok(()))) {
            drop(Object::take(object));
        }
    });
}

/// Waits until the database answers, for `patience` at the most, and logs each
/// attempt. Ends at once where waiting does not help.
async fn wait_for(options: &PgConnectOptions, patience: Duration) -> Result<PgConnection, Error> {
    let give_up_at = Instant::now() + patience;
    let mut retry_after = FIRST_RETRY_AFTER;
    loop {
        let error = match timeout(CONNECT_TIMEOUT, options.connect()).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) if is_final(&error) => return Err(Error::internal(error)),
            Ok(Err(error)) => Error::from(error),
            Err(_) => Error::DatabaseUnavailable("no answer to the attempt to connect".into()),
        };
        let (Error::DatabaseUnavailable(cause) | Error::Internal(cause)) = error else {
            return Err(error);
        };
        if Instant::now() + retry_after > give_up_at {
            return Err(Error::DatabaseUnavailable(
                format!(
                    "the database at {}:{} did not answer in time (DATABASE_WAIT_SECONDS): {}",
                    options.get_host(),
                    options.get_port(),
                    ErrorChain(&*cause)
                )
                .into(),
            ));
        }
        tracing::warn!(
            cause = %ErrorChain(&*cause),
            host = options.get_host(),
            port = options.get_port(),
            retry_after_ms = u64::try_from(retry_after.as_millis()).unwrap_or(u64::MAX),
            "waiting for the database"
        );
        tokio::time::sleep(retry_after).await;
        retry_after = (retry_after * 2).min(MAX_RETRY_AFTER);
    }
}

fn is_final(error: &sqlx::Error) -> bool {
    let Some(code) = error.as_database_error().and_then(sqlx::error::DatabaseError::code) else {
        return matches!(error, sqlx::Error::Configuration(_));
    };
    FINAL_CLASSES.iter().any(|class| code.starts_with(class))
}

/// Waits for the database, and refuses one that the service cannot use.
pub async fn reach(options: &PgConnectOptions, patience: Duration) -> Result<PgConnection, Error> {
    let mut connection = wait_for(options, patience).await?;
    check_encoding(&mut connection).await?;
    Ok(connection)
}

/// Brings the schema up to date. Waits for another replica that does, and for locks, for
/// `patience` at the most; the work itself may take as long as it needs.
pub async fn migrate(options: &PgConnectOptions, patience: Duration) -> Result<(), Error> {
    // Zero would mean no limit.
    let lock_timeout = format!("{}ms", patience.as_millis().max(1_000));
    let options = options.clone().options([
        ("statement_timeout", "0"),
        ("lock_timeout", &*lock_timeout),
        // The migrator creates its table if it is not there, and PostgreSQL notes when it
        // is.
        ("client_min_messages", "warning"),
    ]);
    // A pool, because a future that holds a borrowed connection here is not `Send`.
    let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(options);
    let migrated = MIGRATIONS.run(&pool).await;
    pool.close().await;
    match migrated {
        Ok(()) => Ok(()),
        Err(MigrateError::Execute(error)) => Err(Error::from(error)),
        Err(error) => Err(Error::internal(error)),
    }
}

/// Waits until somebody else has brought the schema up to date.
pub async fn wait_for_schema(
    connection: &mut PgConnection,
    patience: Duration,
) -> Result<(), Error> {
    let give_up_at = Instant::now() + patience;
    while !is_migrated(connection).await? {
        if Instant::now() >= give_up_at {
            return Err(Error::internal("the database's schema is not the one that is needed"));
        }
        tracing::warn!("waiting for the schema: `fast-zero migrate` brings it up to date");
        tokio::time::sleep(SCHEMA_RETRY_AFTER).await;
    }
    Ok(())
}

/// Refuses a database that cannot hold all texts, and warns of one whose own functions
/// do not know the case of letters outside of ASCII.
async fn check_encoding(connection: &mut PgConnection) -> Result<(), Error> {
    let encoding =
        sqlx::query_scalar!(r#"select current_setting('server_encoding') as "encoding!""#)
            .fetch_one(&mut *connection)
            .await?;
    if encoding != "UTF8" {
        let message = format!("the database's encoding is {encoding}, but must be UTF8");
        return Err(Error::internal(message));
    }
    // A statement of its own: in other encodings there may be no Ç to ask about.
    let folds =
        sqlx::query_scalar!(r#"select lower('Ç') = 'ç' as "folds!""#).fetch_one(connection).await?;
    if !folds {
        tracing::warn!(
            "the database's locale cannot fold the case of letters outside of ASCII (Ç); \
             the service folds by itself, but your own queries with lower() or ILIKE will not"
        );
    }
    Ok(())
}

/// Whether the schema has all that this binary needs; what a newer binary added does
/// no harm.
pub async fn is_migrated(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let needed: Vec<i64> = MIGRATIONS.iter().map(|migration| migration.version).collect();
    // Not `query!`: the table is sqlx's own, and may not be there yet.
    let present: Result<i64, _> = sqlx::query_scalar(
        "select count(*) from _sqlx_migrations where success and version = any($1)",
    )
    .bind(&needed)
    .fetch_one(connection)
    .await;
    match present {
        Ok(present) => Ok(usize::try_from(present) == Ok(needed.len())),
        Err(error) if sqlstate(&error).as_deref() == Some(UNDEFINED_TABLE) => Ok(false),
        Err(error) => Err(error),
    }
}

const UNDEFINED_TABLE: &str = "42P01";
const UNIQUE_VIOLATION: &str = "23505";
const FOREIGN_KEY_VIOLATION: &str = "23503";

/// Whether a statement was refused by this unique constraint.
#[must_use]
pub fn is_unique_violation(error: &sqlx::Error, constraint: &str) -> bool {
    violates(error, UNIQUE_VIOLATION, constraint)
}

/// Whether a statement was refused by this foreign key.
#[must_use]
pub fn is_foreign_key_violation(error: &sqlx::Error, constraint: &str) -> bool {
    violates(error, FOREIGN_KEY_VIOLATION, constraint)
}

/// A distributed PostgreSQL adds the number of a shard to a constraint's name, and
/// may give the name in the message only.
fn violates(error: &sqlx::Error, code: &str, constraint: &str) -> bool {
    let Some(database) = error.as_database_error() else {
        return false;
    };
    let named = match database.constraint() {
        Some(name) => name.starts_with(constraint),
        None => database.message().contains(&format!("\"{constraint}")),
    };
    database.code().as_deref() == Some(code) && named
}

/// Whether this is about the connection, and not about what was to be done on it.
fn is_disconnected(cause: &(dyn std::error::Error + 'static)) -> bool {
    let Some(error) = cause.downcast_ref::<sqlx::Error>() else {
        return false;
    };
    match sqlstate(error) {
        None => true,
        // Broken; ended by an operator; cut in a transaction; to a server that only reads,
        // such as one that was the primary.
        Some(code) => {
            code.starts_with("08")
                || code.starts_with("57P")
                || ["25P03", "25006"].contains(&&*code)
        }
    }
}

fn sqlstate(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code)
}

/// Tells a database that is away from a fault of this service.
impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let Some(code) = sqlstate(&error) else {
            return match error {
                sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => {
                    Self::DatabaseUnavailable(error.into())
                }
                other => Self::internal(other),
            };
        };
        match (&code[..2], &*code) {
            // Statement or lock timeout.
            (_, "57014" | "55P03") => Self::DeadlineExceeded,
            // Connection trouble; no longer let in, or no longer there; out of connections,
            // memory or disk; stopped or starting, or taking no connections; read-only; cut
            // in a transaction; deadlock or serialization failure.
            ("08" | "28" | "3D" | "53" | "57" | "58", _)
            | (_, "55000" | "25006" | "25P03" | "40P01" | "40001") => {
                Self::DatabaseUnavailable(error.into())
            }
            _ => Self::internal(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_all_dialects_are_read() {
        for scheme in ["postgres", "postgresql", "postgresql+psycopg", "postgresql+asyncpg"] {
            let options =
                parse_url(&format!("{scheme}://app_user:p%40ss@db:5433/app_db?sslmode=disable"))
                    .expect("a good URL");
            assert_eq!(options.get_host(), "db");
            assert_eq!(options.get_port(), 5433);
            assert_eq!(options.get_username(), "app_user");
            assert_eq!(options.get_database(), Some("app_db"));
        }
        for bad in ["", "db", "mysql://db", "postgresql:/db", "sqlite+aiosqlite:///db"] {
            assert!(parse_url(bad).is_err(), "{bad}");
        }
    }
}
