//! The incarnation of the database: the history that cursors of changes belong to.

use sqlx::PgConnection;
use uuid::Uuid;

use super::errors::sqlstate;
use crate::rpc::error::Error;

/// The SQLSTATE of a table that does not exist.
const UNDEFINED_TABLE: &str = "42P01";

/// Starts a new history, so that all cursors expire. Returns `false` if the schema is older than
/// cursors: its migration starts a new history.
pub(crate) async fn renew(connection: &mut PgConnection) -> Result<bool, Error> {
    let update =
        sqlx::query!("update database_incarnation set id = $1", Uuid::now_v7()).execute(connection);
    let updated = match update.await {
        Err(error) if sqlstate(&error).as_deref() == Some(UNDEFINED_TABLE) => return Ok(false),
        updated => updated?,
    };
    match updated.rows_affected() {
        1 => Ok(true),
        rows => Err(Error::internal(format!("the database has {rows} incarnations"))),
    }
}
