//! The statements that disable and enable users.

use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;

use super::{DeletedCredentials, delete_credentials, reset_codes};
use crate::{database::Database, rpc::error::Error, types::id::UserId};

/// The result of disabling a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Disabled {
    /// The time when the user was disabled, which may be earlier.
    pub(crate) since: OffsetDateTime,
    /// The credentials that the user had.
    pub(crate) deleted: DeletedCredentials,
}

/// The result of enabling a user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Enabled {
    /// Whether the user was disabled before.
    pub(crate) was_disabled: bool,
}

/// Disables a user, and deletes all credentials, in one transaction. Returns `None` if the user
/// does not exist.
///
/// The lock of the user comes first: a login that opens a session holds it, too, so that the
/// deletion sees the session, or the session sees that the user is disabled.
pub(in crate::auth) async fn disable(
    database: &Database,
    id: UserId,
) -> Result<Option<Disabled>, Error> {
    let now = database.clock().now();
    database
        .run(async |connection| {
            let mut transaction = connection.begin().await?;
            let Some(since) = set_disabled(&mut transaction, id, now).await? else {
                transaction.rollback().await?;
                return Ok(None);
            };
            let deleted = delete_credentials(&mut transaction, id).await?;
            reset_codes::delete(&mut transaction, id).await?;
            transaction.commit().await?;
            Ok(Some(Disabled { since, deleted }))
        })
        .await
}

/// Enables a user. Returns `None` if the user does not exist.
pub(in crate::auth) async fn enable(
    database: &Database,
    id: UserId,
) -> Result<Option<Enabled>, Error> {
    database
        .run(async |connection| {
            let row = sqlx::query!(
                r#"with before as (
                       select id, disabled_at from users where id = $1 for no key update
                   )
                   update users set disabled_at = null from before
                   where users.id = $1 and before.id = users.id
                   returning before.disabled_at is not null as "was_disabled!""#,
                id.as_uuid(),
            )
            .fetch_optional(connection)
            .await?;
            Ok(row.map(|row| Enabled { was_disabled: row.was_disabled }))
        })
        .await
}

/// Returns since when the user is disabled; `None` if the user does not exist.
async fn set_disabled(
    connection: &mut PgConnection,
    id: UserId,
    now: OffsetDateTime,
) -> Result<Option<OffsetDateTime>, Error> {
    let row = sqlx::query!(
        r#"update users set disabled_at = coalesce(disabled_at, $2)
           where id = $1 returning disabled_at as "disabled_at!""#,
        id.as_uuid(),
        now,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| row.disabled_at))
}
