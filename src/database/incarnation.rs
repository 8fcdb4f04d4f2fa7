//! The incarnation of the database: the history that cursors of changes belong to.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::rpc::error::Error;

/// Starts a new history, so that all cursors expire.
pub(crate) async fn renew(connection: &mut PgConnection) -> Result<(), Error> {
    let updated =
        sqlx::query!("update database_incarnation set id = $1", Uuid::now_v7()).execute(connection);
    match updated.await?.rows_affected() {
        1 => Ok(()),
        rows => Err(Error::internal(format!("the database has {rows} incarnations"))),
    }
}
