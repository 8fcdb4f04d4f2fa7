//! The statements on the credentials of users, on [`sessions`], on [`personal_access_tokens`], and
//! on [`reset_codes`], and those on [`disabled_users`].

pub(super) mod disabled_users;
mod personal_access_tokens;
pub(super) mod reset_codes;
mod sessions;

use std::time::Duration;

use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use self::{
    personal_access_tokens::FindToken,
    sessions::{
        FindSessionExpiry, delete_session, delete_sessions, insert_session, list_sessions,
        prune_sessions, rotate,
    },
};
use super::{Session, refresh_token::RefreshToken};
use crate::{
    crypto::password::PasswordHash,
    database::{
        Database,
        batch::{BatchQuery, QueryBatcher},
    },
    rpc::{caller::SessionCaller, error::Error},
    types::{
        clock::Clock,
        email::EmailKey,
        id::{SessionId, UserId},
        login::LoginIdentifier,
    },
};

pub(super) use self::personal_access_tokens::TokenCreation;

/// The statements of authentication.
#[derive(Debug)]
pub(super) struct AuthStore {
    database: Database,
    session_expiry: QueryBatcher<FindSessionExpiry>,
    token: QueryBatcher<FindToken>,
}

/// What a password check needs of a user.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    pub(super) user_id: UserId,
    pub(super) username: String,
    pub(super) email: String,
    pub(super) password: PasswordHash,
    /// Changes with the password. A rehash of the same password does not change it.
    pub(super) password_version: i64,
    /// Whether an operator has disabled the user.
    pub(super) is_disabled: bool,
}

struct CredentialsRow {
    id: Uuid,
    username: String,
    email: String,
    password_hash: String,
    password_version: i64,
    is_disabled: bool,
}

impl From<CredentialsRow> for Credentials {
    fn from(row: CredentialsRow) -> Self {
        Self {
            user_id: UserId::from_uuid(row.id),
            username: row.username,
            email: row.email,
            password: PasswordHash::from_stored(row.password_hash),
            password_version: row.password_version,
            is_disabled: row.is_disabled,
        }
    }
}

/// A session that a login opens.
#[derive(Debug)]
pub(super) struct NewSession {
    pub(super) id: SessionId,
    pub(super) user_id: UserId,
    pub(super) now: OffsetDateTime,
    pub(super) expires_at: OffsetDateTime,
    pub(super) user_agent: String,
    pub(super) peer: String,
}

/// The result of a rotation.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RotationOutcome {
    /// The token was the current one, or its direct predecessor within the grace period. The
    /// successor has this generation and expiry.
    Successor { generation: i32, expires_at: OffsetDateTime },
    /// The token was used before.
    Reused,
    /// The session has expired.
    Expired,
    /// The session does not exist.
    SessionNotFound,
}

/// The sessions of the caller that a logout ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RevocationScope {
    This,
    Others,
    All,
}

/// How many credentials were deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeletedCredentials {
    /// The number of sessions that ended.
    pub(crate) sessions: u64,
    /// The number of personal access tokens that were revoked.
    pub(crate) personal_access_tokens: u64,
}

impl AuthStore {
    /// Creates the store. `deadline` is the longest time for which a batched query waits.
    pub(super) fn new(database: Database, batching: bool, deadline: Duration) -> Self {
        let session_expiry = QueryBatcher::new(database.clone(), batching, deadline);
        let token = QueryBatcher::new(database.clone(), batching, deadline);
        Self { database, session_expiry, token }
    }

    /// Finds the credentials of the user with a login. An invalid login costs a query, too, so
    /// that it takes as long.
    pub(super) async fn find_credentials(
        &self,
        login: &LoginIdentifier,
    ) -> Result<Option<Credentials>, Error> {
        self.database.run(async |connection| find_credentials(connection, login).await).await
    }

    /// Finds the credentials of a user.
    pub(super) async fn find_credentials_by_id(
        &self,
        user_id: UserId,
    ) -> Result<Option<Credentials>, Error> {
        self.database
            .run(async |connection| {
                let row = sqlx::query_as!(
                    CredentialsRow,
                    r#"select id, username, email, password_hash, password_version,
                         disabled_at is not null as "is_disabled!"
                     from users where id = $1"#,
                    user_id.as_uuid(),
                )
                .fetch_optional(connection)
                .await?;
                Ok(row.map(Credentials::from))
            })
            .await
    }

    /// Replaces the hash of a password with another one of the same password, if it still is
    /// the hash that was verified.
    pub(super) async fn update_password_hash(
        &self,
        verified: &Credentials,
        hash: &PasswordHash,
    ) -> Result<(), Error> {
        self.database
            .run(async |connection| {
                sqlx::query!(
                    "update users set password_hash = $3 where id = $1 and password_hash = $2",
                    verified.user_id.as_uuid(),
                    verified.password.as_str(),
                    hash.as_str(),
                )
                .execute(connection)
                .await?;
                Ok(())
            })
            .await
    }

    /// Returns how long the caller's session is still active, or `None` if it is not.
    pub(super) async fn time_left_of_session(
        &self,
        caller: SessionCaller,
    ) -> Result<Option<Duration>, Error> {
        Ok(self.time_left(self.session_expiry.run(caller).await?))
    }

    /// Returns which sessions are active, in order, with one statement.
    pub(super) async fn are_sessions_active(
        &self,
        callers: &[SessionCaller],
    ) -> Result<Vec<bool>, Error> {
        let expiries = self
            .database
            .run(async |connection| FindSessionExpiry::run_batch(connection, callers).await)
            .await?;
        Ok(expiries.into_iter().map(|expiry| self.time_left(expiry.flatten()).is_some()).collect())
    }

    fn time_left(&self, expires_at: Option<OffsetDateTime>) -> Option<Duration> {
        let time_left = expires_at? - self.database.clock().now();
        time_left.is_positive().then(|| time_left.unsigned_abs())
    }

    /// Returns the clock of all times in the rows.
    pub(super) fn clock(&self) -> &Clock {
        self.database.clock()
    }

    /// Inserts a session, and then deletes the user's expired ones and the oldest beyond
    /// [`MAX_SESSIONS`]. Returns `None` if the password that was verified is not the current one
    /// any more, or the user is disabled or does not exist; otherwise whether any session was
    /// deleted.
    ///
    /// Two statements: the last one to prune of several concurrent logins sees all of their
    /// sessions.
    pub(super) async fn open_session(
        &self,
        session: &NewSession,
        password_version: i64,
    ) -> Result<Option<bool>, Error> {
        self.database
            .run(async |connection| {
                if !insert_session(connection, session, password_version).await? {
                    return Ok(None);
                }
                prune_sessions(connection, session.user_id, session.now).await.map(Some)
            })
            .await
    }

    /// Rotates a refresh token, if it is the current one. Ends the session if the token was used
    /// before.
    pub(super) async fn rotate(
        &self,
        token: RefreshToken,
        now: OffsetDateTime,
        expires_at: OffsetDateTime,
    ) -> Result<RotationOutcome, Error> {
        self.database
            .run(async |connection| {
                let outcome = rotate(connection, token, now, expires_at).await?;
                if outcome == RotationOutcome::Reused {
                    delete_sessions(connection, token.caller, RevocationScope::This).await?;
                }
                Ok(outcome)
            })
            .await
    }

    /// Deletes sessions of the caller.
    pub(super) async fn delete_sessions(
        &self,
        caller: SessionCaller,
        scope: RevocationScope,
    ) -> Result<(), Error> {
        self.database.run(async |connection| delete_sessions(connection, caller, scope).await).await
    }

    /// Deletes an active session of a user. Returns `true` if there was one.
    pub(super) async fn delete_session(
        &self,
        user_id: UserId,
        session_id: SessionId,
        now: OffsetDateTime,
    ) -> Result<bool, Error> {
        self.database
            .run(async |connection| delete_session(connection, user_id, session_id, now).await)
            .await
    }

    /// Lists a user's active sessions, newest first.
    pub(super) async fn list_sessions(
        &self,
        user_id: UserId,
        now: OffsetDateTime,
    ) -> Result<Vec<Session>, Error> {
        self.database.run(async |connection| list_sessions(connection, user_id, now).await).await
    }

    /// Sets a password and deletes all sessions but the caller's, if the password that was verified
    /// still is the current one and the user is not disabled. Returns `true` if that was so. The
    /// open reset code stays: an intruder who knows the password must not invalidate it.
    ///
    /// Further statements: they see what was inserted while the first one waited for the row. The
    /// caller of this method runs it to completion.
    pub(super) async fn change_password(
        &self,
        caller: SessionCaller,
        verified: &Credentials,
        hash: &PasswordHash,
    ) -> Result<bool, Error> {
        self.database
            .run(async |connection| {
                let mut transaction = connection.begin().await?;
                let changed = sqlx::query!(
                    "update users set password_hash = $3, password_version = password_version + 1
                     where id = $1 and password_version = $2 and disabled_at is null",
                    caller.user_id.as_uuid(),
                    verified.password_version,
                    hash.as_str(),
                )
                .execute(&mut *transaction)
                .await?;
                if changed.rows_affected() == 0 {
                    transaction.rollback().await?;
                    return Ok(false);
                }
                delete_sessions(&mut transaction, caller, RevocationScope::Others).await?;
                transaction.commit().await?;
                Ok(true)
            })
            .await
    }
}

/// Finds the ID of the user with a login.
///
/// # Errors
/// Those of the database.
pub(crate) async fn find_user_id(
    database: &Database,
    login: &LoginIdentifier,
) -> Result<Option<UserId>, Error> {
    let found = database.run(async |connection| find_credentials(connection, login).await).await?;
    Ok(found.map(|credentials| credentials.user_id))
}

/// Deletes the sessions and personal access tokens of a user.
async fn delete_credentials(
    connection: &mut PgConnection,
    user_id: UserId,
) -> Result<DeletedCredentials, Error> {
    let sessions = sqlx::query!("delete from sessions where user_id = $1", user_id.as_uuid())
        .execute(&mut *connection)
        .await?;
    let tokens =
        sqlx::query!("delete from personal_access_tokens where user_id = $1", user_id.as_uuid())
            .execute(connection)
            .await?;
    Ok(DeletedCredentials {
        sessions: sessions.rows_affected(),
        personal_access_tokens: tokens.rows_affected(),
    })
}

async fn find_credentials(
    connection: &mut PgConnection,
    login: &LoginIdentifier,
) -> Result<Option<Credentials>, Error> {
    let username = match login {
        LoginIdentifier::Email(email) => return find_by_email(connection, email).await,
        LoginIdentifier::Username(username) => username,
        LoginIdentifier::Invalid => "",
    };
    let row = sqlx::query_as!(
        CredentialsRow,
        r#"select id, username, email, password_hash, password_version,
             disabled_at is not null as "is_disabled!"
         from users where username_folded = $1"#,
        username,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(Credentials::from))
}

async fn find_by_email(
    connection: &mut PgConnection,
    email: &EmailKey,
) -> Result<Option<Credentials>, Error> {
    let rows = sqlx::query_as!(
        CredentialsRow,
        r#"select id, username, email, password_hash, password_version,
             disabled_at is not null as "is_disabled!"
         from users where email_folded = any($1::text[])
         order by array_position($1::text[], email_folded)"#,
        email.stored_forms(),
    )
    .fetch_all(connection)
    .await?;
    let is_same = |row: &CredentialsRow| EmailKey::new(&row.email).is_same_address(email);
    Ok(rows.into_iter().find(is_same).map(Credentials::from))
}
