//! The schema: migrations, and whether they are applied.

use std::time::Duration;

use sqlx::{
    PgConnection, PgExecutor, PgPool,
    migrate::MigrateError,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::{Instant, sleep};

use super::{
    connect::CONNECT_TIMEOUT,
    errors::{INSUFFICIENT_PRIVILEGE, UNDEFINED_TABLE, is_refused_parameter, sqlstate},
    state::{DatabaseState, GRANT_HINT, MIGRATIONS},
};
use crate::{
    rpc::error::Error,
    types::{clock::Clock, error_chain::ErrorChain},
};

/// The interval in which a replica that does not migrate checks the schema.
const SCHEMA_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Applies the migrations that are missing. Waits for another replica that does the same, and
/// for locks, for at most `max_wait`; a migration itself may take as long as it needs.
pub(crate) async fn migrate(options: &PgConnectOptions, max_wait: Duration) -> Result<(), Error> {
    // Zero would mean no limit.
    let lock_timeout = format!("{}ms", max_wait.as_millis().max(1_000));
    let options = options.clone().options([
        ("statement_timeout", "0"),
        ("lock_timeout", &*lock_timeout),
        // The migrator creates its table if it does not exist; PostgreSQL reports a notice if it
        // does.
        ("client_min_messages", "warning"),
    ]);
    let pool = connect(options).await?;
    let migrated = run_missing(&pool).await;
    pool.close().await;
    migrated
}

async fn run_missing(pool: &PgPool) -> Result<(), Error> {
    let before = applied_versions(pool).await?;
    match MIGRATIONS.run(pool).await {
        Ok(()) => {
            log_applied(&before);
            Ok(())
        }
        Err(MigrateError::Execute(error)) => Err(Error::from(error)),
        Err(MigrateError::VersionMismatch(version)) => {
            Err(of_another_program(&format!("another migration {version} than fast-zero")))
        }
        Err(error) => Err(Error::internal(error)),
    }
}

fn of_another_program(migrations: &str) -> Error {
    Error::internal(format!(
        "the table _sqlx_migrations has {migrations}: another program uses this database; set \
         DATABASE_URL to a database of its own"
    ))
}

/// Opens the connection of a migration: a pool of one, because the future of a borrowed connection
/// is not `Send` here. A connection pooler refuses its settings: in transaction mode, it would also
/// lose the lock of the migration.
async fn connect(options: PgConnectOptions) -> Result<PgPool, Error> {
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(CONNECT_TIMEOUT)
        .after_connect(|connection, _| Box::pin(prepare_session(connection)));
    pool.connect_with(options).await.map_err(|error| match error {
        error if is_refused_parameter(&error) => Error::internal(format!(
            "a connection pooler in front of the database refuses the session of a migration: run \
             `fast-zero migrate` with a DATABASE_URL that names PostgreSQL itself, and the service \
             with MIGRATE_ON_START=false: {}",
            ErrorChain(&error)
        )),
        sqlx::Error::PoolTimedOut => Error::DatabaseUnavailable("timed out".into()),
        error => error.into(),
    })
}

/// Sets what are no startup parameters, because some versions would refuse them.
///
/// Disables the timeout that the role or the database may have, which PostgreSQL 17 introduced.
/// Ends the statement, and releases its locks, soon after the process ends: PostgreSQL otherwise
/// notices that only when it sends the result. Some operating systems do not support that.
async fn prepare_session(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(
        "select set_config(name, '0', false) from pg_settings where name = 'transaction_timeout'",
    )
    .execute(&mut *connection)
    .await?;
    let checked = sqlx::raw_sql(
        "select set_config(name, '1s', false) from pg_settings
         where name = 'client_connection_check_interval'",
    )
    .execute(connection)
    .await;
    match checked {
        Err(error) if error.as_database_error().is_none() => Err(error),
        _ => Ok(()),
    }
}

/// Returns the versions of the applied migrations: none if their table does not exist. Rejects a
/// table in which none is ours, before the program to which it belongs finds ours in it.
async fn applied_versions(executor: impl PgExecutor<'_>) -> Result<Vec<i64>, Error> {
    let rows = sqlx::query_as("select version, checksum, success from _sqlx_migrations");
    let rows: Vec<(i64, Vec<u8>, bool)> = match rows.fetch_all(executor).await {
        Ok(rows) => rows,
        Err(error) if sqlstate(&error).as_deref() == Some(UNDEFINED_TABLE) => Vec::new(),
        Err(error) => return Err(with_grant_hint(error)),
    };
    let is_ours = |(version, checksum, _): &(i64, Vec<u8>, bool)| {
        MIGRATIONS.iter().any(|it| it.version == *version && *it.checksum == **checksum)
    };
    if !rows.is_empty() && !rows.iter().any(is_ours) {
        return Err(of_another_program("no migration of fast-zero"));
    }
    Ok(rows.into_iter().filter(|(.., success)| *success).map(|(version, ..)| version).collect())
}

/// Logs the migrations that were missing. Another replica may have applied some of them meanwhile.
fn log_applied(before: &[i64]) {
    let applied = MIGRATIONS.iter().filter(|migration| !before.contains(&migration.version));
    let applied: Vec<_> = applied
        .map(|migration| format!("{:04} {}", migration.version, migration.description))
        .collect();
    if !applied.is_empty() {
        tracing::info!(applied = applied.join(", "), "schema migrated");
    }
}

/// Rejects a database that lacks migrations.
pub(crate) async fn require_schema(connection: &mut PgConnection) -> Result<(), Error> {
    wait_for_schema(connection, Duration::ZERO).await
}

/// Waits until another process has applied the migrations, for at most `timeout`.
pub(crate) async fn wait_for_schema(
    connection: &mut PgConnection,
    timeout: Duration,
) -> Result<(), Error> {
    let deadline = Instant::now() + timeout;
    let clock = Clock::default();
    loop {
        let state = DatabaseState::read(connection, &clock).await.map_err(with_grant_hint)?;
        if state.is_schema_current {
            return Ok(());
        }
        applied_versions(&mut *connection).await?;
        if Instant::now() >= deadline {
            return Err(Error::internal(
                "the database schema is outdated: run `fast-zero migrate`, or set \
                 MIGRATE_ON_START=true",
            ));
        }
        tracing::warn!(hint = "run `fast-zero migrate`", "waiting for schema migration");
        sleep(SCHEMA_POLL_INTERVAL).await;
    }
}

fn with_grant_hint(error: sqlx::Error) -> Error {
    if sqlstate(&error).as_deref() != Some(INSUFFICIENT_PRIVILEGE) {
        return error.into();
    }
    Error::internal(format!("{}: {GRANT_HINT}", ErrorChain(&error)))
}
