//! The username and the email of a user, which are unique among users.

use sqlx::PgConnection;

use crate::{
    database::errors::is_unique_violation,
    rpc::error::Error,
    types::{email::EmailKey, id::UserId},
    user::Username,
};

/// What a write is about to set of a user.
pub(super) struct Logins<'a> {
    pub(super) id: UserId,
    /// The new username, or `None` if it does not change.
    pub(super) username: Option<&'a Username>,
    /// The new email address, or `None` if it does not change.
    pub(super) email: Option<&'a EmailKey>,
}

/// Returns which of the unique values exists, or the error itself.
pub(super) fn conflict_error(error: sqlx::Error) -> Error {
    if is_unique_violation(&error, "users_username_key") {
        Error::UsernameExists
    } else if is_unique_violation(&error, "users_email_key") {
        Error::EmailExists
    } else {
        error.into()
    }
}

impl Logins<'_> {
    /// Checks what the constraints cannot see: rows with another form of the same domain.
    ///
    /// # Errors
    /// [`Error::UsernameExists`] or [`Error::EmailExists`].
    pub(super) async fn check_forms(&self, connection: &mut PgConnection) -> Result<(), Error> {
        match self.email {
            Some(email) if !email.is_unambiguous() => self.claim_email(connection, email).await,
            _ => Ok(()),
        }
    }

    /// Returns normally if the write that failed may succeed if it is repeated.
    ///
    /// # Errors
    /// [`Error::UsernameExists`], [`Error::EmailExists`], or the error itself.
    pub(super) async fn resolve_conflict(
        &self,
        connection: &mut PgConnection,
        error: sqlx::Error,
    ) -> Result<(), Error> {
        match (self.email, conflict_error(error)) {
            (Some(email), Error::EmailExists) => self.claim_email(connection, email).await,
            (_, error) => Err(error),
        }
    }

    /// Ensures that no other user has the address, and no other address its form: version 0.1.0
    /// gives the domains `straße.de` and `strasse.de` the same one.
    async fn claim_email(
        &self,
        connection: &mut PgConnection,
        email: &EmailKey,
    ) -> Result<(), Error> {
        let rows = sqlx::query!(
            "select id, email, email_folded from users
             where email_folded = any($1::text[]) and id <> $2",
            email.stored_forms(),
            self.id.as_uuid(),
        )
        .fetch_all(&mut *connection)
        .await?;
        for row in rows {
            let other = EmailKey::new(&row.email);
            if other.is_same_address(email) {
                return Err(self.email_conflict(connection).await);
            }
            if other.folded() == row.email_folded {
                continue;
            }
            sqlx::query!(
                "update users set email_folded = $3 where id = $1 and email_folded = $2",
                row.id,
                row.email_folded,
                other.folded(),
            )
            .execute(&mut *connection)
            .await
            // Version 0.1.0 has accepted an address that another user has.
            .map_err(conflict_error)?;
        }
        Ok(())
    }

    /// Returns why the email was rejected. The username comes first if both exist: which of the
    /// two PostgreSQL reports depends on the age of the indexes.
    async fn email_conflict(&self, connection: &mut PgConnection) -> Error {
        let Some(username) = self.username else {
            return Error::EmailExists;
        };
        let taken = sqlx::query_scalar!(
            r#"select exists (
                   select from users where username_folded = $1 and id <> $2
               ) as "taken!""#,
            username.folded(),
            self.id.as_uuid(),
        )
        .fetch_one(connection)
        .await;
        match taken {
            Ok(true) => Error::UsernameExists,
            Ok(false) => Error::EmailExists,
            Err(error) => error.into(),
        }
    }
}
