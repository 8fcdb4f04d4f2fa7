//! What the service needs of its database: the schema, writes, and privileges.

use sqlx::{PgConnection, Row, migrate::Migrator};

use super::{
    Database,
    errors::{UNDEFINED_TABLE, sqlstate},
};
use crate::{rpc::error::Error, types::clock::Clock};

/// The migrations that this binary needs. A newer binary may have applied more.
pub(super) static MIGRATIONS: Migrator = Migrator { ignore_missing: true, ..sqlx::migrate!() };

/// What an operator does about missing privileges.
pub(super) const GRANT_HINT: &str = "grant the role of DATABASE_URL select, insert, update and \
                                     delete on all tables, for example by default privileges of \
                                     the role that migrates";

/// The state of the database.
pub(super) struct DatabaseState {
    /// A standby is read-only, and a database that an operator made so.
    pub(super) is_read_only: bool,
    /// The missing privileges, such as `insert on todos`; none of tables that do not exist.
    pub(super) missing_privileges: Vec<String>,
    /// Whether all migrations that this binary needs are applied.
    pub(super) is_schema_current: bool,
}

impl DatabaseState {
    /// Reads the state with one statement, and makes the clock follow that of the database.
    pub(super) async fn read(
        connection: &mut PgConnection,
        clock: &Clock,
    ) -> Result<Self, sqlx::Error> {
        let (versions, checksums): (Vec<_>, Vec<_>) =
            MIGRATIONS.iter().map(|it| (it.version, it.checksum.to_vec())).unzip();
        let reading = clock.start_reading();
        // Not `query!`: the table of the migrations is sqlx's own, and may not exist yet. With the
        // checksum, because another program may have migrations with the same numbers.
        let row = sqlx::query(
            "select (extract(epoch from clock_timestamp()) * 1000000)::bigint,
                 current_setting('transaction_read_only')::boolean,
                 array(
                     select privilege || ' on ' || name
                     from unnest(array[
                             'users', 'sessions', 'todos', 'todo_clocks', 'todo_trash',
                             'database_incarnation', 'personal_access_tokens',
                             'password_reset_codes'
                         ]) as name,
                         unnest(array['select', 'insert', 'update', 'delete']) as privilege
                     where not has_table_privilege(to_regclass(name), privilege)
                 ),
                 not exists (
                     select * from unnest($1::bigint[], $2::bytea[])
                     except
                     select version, checksum from _sqlx_migrations where success
                 )",
        )
        .bind(versions)
        .bind(checksums)
        .fetch_one(connection)
        .await;
        match row {
            Ok(row) => {
                reading.finish(row.try_get(0)?);
                Ok(Self {
                    is_read_only: row.try_get(1)?,
                    missing_privileges: row.try_get(2)?,
                    is_schema_current: row.try_get(3)?,
                })
            }
            // The schema is missing, and nothing else matters.
            Err(error) if sqlstate(&error).as_deref() == Some(UNDEFINED_TABLE) => Ok(Self {
                is_read_only: false,
                missing_privileges: Vec::new(),
                is_schema_current: false,
            }),
            Err(error) => Err(error),
        }
    }
}

impl Database {
    /// Rejects a role with which some calls would always fail.
    pub(crate) async fn check_privileges(&self) -> Result<(), Error> {
        let read = async |connection: &mut PgConnection| {
            Ok(DatabaseState::read(connection, self.clock()).await?)
        };
        let missing = self.run(read).await?.missing_privileges;
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join(", ");
        Err(Error::internal(format!("the role of the database lacks {missing}: {GRANT_HINT}")))
    }
}
