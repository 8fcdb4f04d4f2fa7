//! The clock of the database.

use sqlx::{PgConnection, Row};

use crate::types::clock::Clock;

/// Makes a clock follow that of the database.
pub(super) async fn synchronize(
    clock: &Clock,
    connection: &mut PgConnection,
) -> Result<(), sqlx::Error> {
    let reading = clock.start_reading();
    // Not prepared: a pooler may give the session to others.
    let row = sqlx::raw_sql("select (extract(epoch from clock_timestamp()) * 1000000)::bigint")
        .fetch_one(connection)
        .await?;
    reading.finish(row.try_get(0)?);
    Ok(())
}
