//! The privileges of the service's role on the tables.

use sqlx::PgConnection;

use super::Database;
use crate::rpc::error::Error;

/// What an operator does about missing privileges.
pub(super) const GRANT_HINT: &str = "grant the role of DATABASE_URL select, insert, update and \
                                     delete on all tables, for example by default privileges of \
                                     the role that migrates";

/// Returns the missing privileges, such as `insert on todos`; none of tables that do not exist.
pub(super) async fn missing_privileges(
    connection: &mut PgConnection,
) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select privilege || ' on ' || name
         from unnest(array['users', 'sessions', 'todos']) as name,
             unnest(array['select', 'insert', 'update', 'delete']) as privilege
         where not has_table_privilege(to_regclass(name), privilege)",
    )
    .fetch_all(connection)
    .await
}

impl Database {
    /// Rejects a role with which some calls would always fail.
    pub(crate) async fn check_privileges(&self) -> Result<(), Error> {
        let missing = self.run(async |connection| Ok(missing_privileges(connection).await?));
        let missing = missing.await?;
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join(", ");
        Err(Error::internal(format!("the role of the database lacks {missing}: {GRANT_HINT}")))
    }
}
