//! The statements on reset codes.
//!
//! A write locks the row of the user first, as all writes of credentials do, so that two of them
//! never wait for each other.

use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;

use super::{AuthStore, delete_credentials};
use crate::{
    crypto::{
        password::PasswordHash,
        random_secret::{RandomSecret, SecretHash},
    },
    database::Database,
    rpc::error::Error,
    types::id::UserId,
};

/// An open reset code, and what a new password must differ from.
#[derive(Debug)]
pub(in crate::auth) struct OpenResetCode {
    pub(in crate::auth) username: String,
    pub(in crate::auth) email: String,
    pub(in crate::auth) hash: SecretHash,
}

/// Stores the hash of a user's reset code, in place of any other code.
///
/// # Errors
/// [`Error::UserNotFound`], [`Error::UserDisabled`], and those of the database.
pub(in crate::auth) async fn replace(
    database: &Database,
    user_id: UserId,
    hash: &SecretHash,
    expires_at: OffsetDateTime,
) -> Result<(), Error> {
    database
        .run(async |connection| {
            let replaced = sqlx::query!(
                "insert into password_reset_codes (user_id, code_hash, expires_at)
                 select $1, $2, $3 from users where users.id = $1 and disabled_at is null
                 for share
                 on conflict (user_id) do update
                     set code_hash = excluded.code_hash, expires_at = excluded.expires_at",
                user_id.as_uuid(),
                &hash.as_bytes()[..],
                expires_at,
            )
            .execute(&mut *connection)
            .await?;
            if replaced.rows_affected() > 0 {
                return Ok(());
            }
            let user = sqlx::query!("select id from users where id = $1", user_id.as_uuid())
                .fetch_optional(connection)
                .await?;
            Err(user.map_or(Error::UserNotFound, |_| Error::UserDisabled))
        })
        .await
}

impl AuthStore {
    /// Finds the open reset code of a user. Returns `None` if the user has none, is disabled or
    /// does not exist.
    pub(in crate::auth) async fn find_reset_code(
        &self,
        user_id: UserId,
    ) -> Result<Option<OpenResetCode>, Error> {
        let now = self.clock().now();
        self.database
            .run(async |connection| {
                let row = sqlx::query!(
                    "select username, email, code_hash
                     from password_reset_codes as code join users on users.id = code.user_id
                     where code.user_id = $1 and users.id = $1 and code.expires_at > $2
                         and disabled_at is null",
                    user_id.as_uuid(),
                    now,
                )
                .fetch_optional(connection)
                .await?;
                let Some(row) = row else {
                    return Ok(None);
                };
                let hash = SecretHash::from_stored(&row.code_hash)
                    .ok_or_else(|| Error::internal("a stored reset code is damaged"))?;
                Ok(Some(OpenResetCode { username: row.username, email: row.email, hash }))
            })
            .await
    }

    /// Redeems a reset code and sets the password, in one statement, and then deletes all sessions,
    /// and all personal access tokens, of the user. Returns `false`, and changes nothing, if the
    /// code is not the open one any more, or the user is disabled.
    ///
    /// Further statements: they see what was inserted while the first one waited for the row of the
    /// user. The caller of this method runs it to completion.
    pub(in crate::auth) async fn reset_password(
        &self,
        user_id: UserId,
        secret: &RandomSecret,
        password: &PasswordHash,
    ) -> Result<bool, Error> {
        let now = self.clock().now();
        self.database
            .run(async |connection| {
                let mut transaction = connection.begin().await?;
                if !redeem(&mut transaction, user_id, &secret.hash(), password, now).await? {
                    transaction.rollback().await?;
                    return Ok(false);
                }
                delete_credentials(&mut transaction, user_id).await?;
                transaction.commit().await?;
                Ok(true)
            })
            .await
    }
}

/// Of two uses of a code at once, the second one waits for the row of the user, and then finds no
/// code.
async fn redeem(
    connection: &mut PgConnection,
    user_id: UserId,
    hash: &SecretHash,
    password: &PasswordHash,
    now: OffsetDateTime,
) -> Result<bool, Error> {
    let changed = sqlx::query!(
        "with account as (
             select id from users where id = $1 and disabled_at is null for no key update
         ), used as (
             delete from password_reset_codes as code using account
             where code.user_id = $1 and code.user_id = account.id
                 and code_hash = $2 and expires_at > $3
             returning code.user_id
         )
         update users set password_hash = $4, password_version = password_version + 1
         from used where users.id = $1 and used.user_id = users.id",
        user_id.as_uuid(),
        &hash.as_bytes()[..],
        now,
        password.as_str(),
    )
    .execute(connection)
    .await?;
    Ok(changed.rows_affected() > 0)
}

/// Deletes the open reset code of a user, if there is one.
pub(super) async fn delete(connection: &mut PgConnection, user_id: UserId) -> Result<(), Error> {
    sqlx::query!("delete from password_reset_codes where user_id = $1", user_id.as_uuid())
        .execute(connection)
        .await?;
    Ok(())
}
