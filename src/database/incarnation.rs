//! The incarnation of the database: the history that cursors of changes belong to.

use sqlx::PgConnection;
use uuid::Uuid;

use super::errors::{UNDEFINED_TABLE, sqlstate};
use crate::rpc::error::Error;

/// Starts a new history, so that all cursors expire. Returns `false` if the schema is older than
/// cursors: its migration starts a new history.
pub(crate) async fn renew(connection: &mut PgConnection) -> Result<bool, Error> {
    let updated = sqlx::query!("update database_incarnation set id = $1", Uuid::now_v7())
        .execute(connection)
        .await;
    if let Err(error) = &updated
        && sqlstate(error).as_deref() == Some(UNDEFINED_TABLE)
    {
        return Ok(false);
    }
    match updated?.rows_affected() {
        1 => Ok(true),
        rows => Err(Error::internal(format!("the database has {rows} incarnations"))),
    }
}
