//! The statements on sessions and on the credentials of users. Each statement on sessions
//! names the user, so that a caller cannot reach another user's.

use std::time::Duration;

use sqlx::{Connection, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{LoginIdentifier, MAX_SESSIONS, REFRESH_GRACE_PERIOD, Session, token::RefreshToken};
use crate::{
    crypto::password::PasswordHash,
    database::{
        Database,
        batch::{BatchQuery, QueryBatcher, by_ordinal},
        errors::is_foreign_key_violation,
    },
    rpc::{caller::Caller, error::Error},
    types::id::{SessionId, UserId},
};

/// The statements of authentication.
#[derive(Debug)]
pub(super) struct AuthStore {
    database: Database,
    session_expiry: QueryBatcher<FindSessionExpiry>,
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
}

struct CredentialsRow {
    id: Uuid,
    username: String,
    email: String,
    password_hash: String,
    password_version: i64,
}

impl From<CredentialsRow> for Credentials {
    fn from(row: CredentialsRow) -> Self {
        Self {
            user_id: UserId::from_uuid(row.id),
            username: row.username,
            email: row.email,
            password: PasswordHash::from_stored(row.password_hash),
            password_version: row.password_version,
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

struct SessionRow {
    id: Uuid,
    rotated_at: OffsetDateTime,
    expires_at: OffsetDateTime,
    user_agent: String,
    peer: String,
}

impl From<SessionRow> for Session {
    fn from(row: SessionRow) -> Self {
        Self {
            id: SessionId::from_uuid(row.id),
            rotated_at: row.rotated_at,
            expires_at: row.expires_at,
            user_agent: row.user_agent,
            peer: row.peer,
        }
    }
}

impl AuthStore {
    /// Creates the store. `deadline` is the longest time for which a batched query waits.
    pub(super) fn new(database: Database, batching: bool, deadline: Duration) -> Self {
        let session_expiry = QueryBatcher::new(database.clone(), batching, deadline);
        Self { database, session_expiry }
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
                    "select id, username, email, password_hash, password_version from users where id = $1",
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

    /// Returns the time when the caller's session expires, or `None` if it does not exist.
    pub(super) async fn session_expiry(
        &self,
        caller: Caller,
    ) -> Result<Option<OffsetDateTime>, Error> {
        self.session_expiry.run(caller).await
    }

    /// Returns the times when sessions expire, in order, with one statement. A session that does
    /// not exist has none.
    pub(super) async fn session_expiries(
        &self,
        callers: &[Caller],
    ) -> Result<Vec<Option<OffsetDateTime>>, Error> {
        let expiries = self
            .database
            .run(async |connection| FindSessionExpiry::run_batch(connection, callers).await)
            .await?;
        Ok(expiries.into_iter().map(Option::flatten).collect())
    }

    /// Inserts a session, and then deletes the user's expired ones and the oldest beyond
    /// [`MAX_SESSIONS`]. Returns `None` if the password that was verified is not the current one
    /// any more, or the user does not exist; otherwise whether any session was deleted.
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
        caller: Caller,
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
            .run(async |connection| {
                let deleted = sqlx::query!(
                    "delete from sessions where user_id = $1 and id = $2 and expires_at > $3",
                    user_id.as_uuid(),
                    session_id.as_uuid(),
                    now,
                )
                .execute(connection)
                .await?;
                Ok(deleted.rows_affected() > 0)
            })
            .await
    }

    /// Lists a user's active sessions, newest first.
    pub(super) async fn list_sessions(
        &self,
        user_id: UserId,
        now: OffsetDateTime,
    ) -> Result<Vec<Session>, Error> {
        self.database
            .run(async |connection| {
                let rows = sqlx::query_as!(
                    SessionRow,
                    "select id, rotated_at, expires_at, user_agent, peer
         from sessions where user_id = $1 and expires_at > $2
         order by id desc limit $3",
                    user_id.as_uuid(),
                    now,
                    MAX_SESSIONS,
                )
                .fetch_all(connection)
                .await?;
                Ok(rows.into_iter().map(Session::from).collect())
            })
            .await
    }

    /// Sets a password and deletes all sessions but the caller's, if the password that was
    /// verified still is the current one. Returns `true` if it was.
    ///
    /// Two statements: the second one sees the sessions that were opened while the first waited
    /// for the row. The caller of this method runs it to completion.
    pub(super) async fn change_password(
        &self,
        caller: Caller,
        verified: &Credentials,
        hash: &PasswordHash,
    ) -> Result<bool, Error> {
        self.database
            .run(async |connection| {
                let mut transaction = connection.begin().await?;
                let changed = sqlx::query!(
                    "update users set password_hash = $3, password_version = password_version + 1
         where id = $1 and password_version = $2",
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

async fn find_credentials(
    connection: &mut PgConnection,
    login: &LoginIdentifier,
) -> Result<Option<Credentials>, Error> {
    let row = match login {
        LoginIdentifier::Email(email) => {
            sqlx::query_as!(
                CredentialsRow,
                "select id, username, email, password_hash, password_version
                 from users where email_folded = $1",
                email,
            )
            .fetch_optional(connection)
            .await?
        }
        LoginIdentifier::Username(_) | LoginIdentifier::Invalid => {
            let username =
                if let LoginIdentifier::Username(username) = login { username } else { "" };
            sqlx::query_as!(
                CredentialsRow,
                "select id, username, email, password_hash, password_version
                 from users where username_folded = $1",
                username,
            )
            .fetch_optional(connection)
            .await?
        }
    };
    Ok(row.map(Credentials::from))
}

/// Inserts a session, if the password that was verified still is the current one. The row of the
/// user stays locked until the session is inserted, so that a change of the password comes
/// before, and is seen, or after, and deletes the session.
async fn insert_session(
    connection: &mut PgConnection,
    session: &NewSession,
    password_version: i64,
) -> Result<bool, Error> {
    let inserted = sqlx::query!(
        "insert into sessions as opened (
             user_id, id, generation, rotated_at, expires_at, user_agent, peer
         )
         select $1, $3, 0, $4, $5, $6, $7
         from users where users.id = $1 and password_version = $2
         for share",
        session.user_id.as_uuid(),
        password_version,
        session.id.as_uuid(),
        session.now,
        session.expires_at,
        session.user_agent,
        session.peer,
    )
    .execute(connection)
    .await;
    match inserted {
        Ok(inserted) => Ok(inserted.rows_affected() > 0),
        // The user was deleted concurrently.
        Err(error) if is_foreign_key_violation(&error, "sessions_user_id_fkey") => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Deletes the user's expired sessions and the oldest ones beyond [`MAX_SESSIONS`]. Returns
/// `true` if any row was deleted.
async fn prune_sessions(
    connection: &mut PgConnection,
    user_id: UserId,
    now: OffsetDateTime,
) -> Result<bool, Error> {
    let deleted = sqlx::query!(
        "delete from sessions
         where user_id = $1 and (
             expires_at <= $2
             or id in (
                 select id from sessions
                 where user_id = $1 and expires_at > $2
                 order by id desc offset $3
             )
         )",
        user_id.as_uuid(),
        now,
        MAX_SESSIONS,
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// Finds the times when sessions expire; `None` for those that do not exist.
#[derive(Debug)]
struct FindSessionExpiry;

impl BatchQuery for FindSessionExpiry {
    type Input = Caller;
    type Output = Option<OffsetDateTime>;

    async fn run_one(
        connection: &mut PgConnection,
        caller: &Caller,
    ) -> Result<Option<OffsetDateTime>, Error> {
        let expires_at = sqlx::query_scalar!(
            "select expires_at from sessions where user_id = $1 and id = $2",
            caller.user_id.as_uuid(),
            caller.session_id.as_uuid(),
        )
        .fetch_optional(connection)
        .await?;
        Ok(expires_at)
    }

    async fn run_batch(
        connection: &mut PgConnection,
        callers: &[Caller],
    ) -> Result<Vec<Option<Option<OffsetDateTime>>>, Error> {
        let (user_ids, ids): (Vec<_>, Vec<_>) = callers
            .iter()
            .map(|caller| (caller.user_id.as_uuid(), caller.session_id.as_uuid()))
            .unzip();
        let rows = sqlx::query!(
            r#"select question as "question!", expires_at
               from unnest($1::uuid[], $2::uuid[]) with ordinality
                   as questions (user_id, id, question)
               join sessions using (user_id, id)"#,
            &user_ids,
            &ids,
        )
        .fetch_all(connection)
        .await?;
        let found = rows.into_iter().map(|row| (row.question, Ok(row.expires_at)));
        Ok(by_ordinal(callers.len(), found))
    }
}

/// One UPDATE that decides on the row itself: it waits for another rotation of the same session,
/// and then sees what that one left.
async fn rotate(
    connection: &mut PgConnection,
    token: RefreshToken,
    now: OffsetDateTime,
    expires_at: OffsetDateTime,
) -> Result<RotationOutcome, Error> {
    let row = sqlx::query!(
        "update sessions set
             generation = case when generation = $3 and expires_at > $4
                 then generation + 1 else generation end,
             rotated_at = case when generation = $3 and expires_at > $4
                 then $4 else rotated_at end,
             expires_at = case when generation = $3 and expires_at > $4
                 then $5 else expires_at end
         where user_id = $1 and id = $2
         returning generation, rotated_at, expires_at",
        token.caller.user_id.as_uuid(),
        token.caller.session_id.as_uuid(),
        token.generation,
        now,
        expires_at,
    )
    .fetch_optional(connection)
    .await?;
    let Some(row) = row else {
        return Ok(RotationOutcome::SessionNotFound);
    };
    if row.expires_at <= now {
        return Ok(RotationOutcome::Expired);
    }
    let is_predecessor = token.generation.checked_add(1) == Some(row.generation);
    if is_predecessor && now < row.rotated_at + REFRESH_GRACE_PERIOD {
        return Ok(RotationOutcome::Successor {
            generation: row.generation,
            expires_at: row.expires_at,
        });
    }
    Ok(RotationOutcome::Reused)
}

async fn delete_sessions(
    connection: &mut PgConnection,
    caller: Caller,
    scope: RevocationScope,
) -> Result<(), Error> {
    sqlx::query!(
        "delete from sessions
         where user_id = $1 and ((id = $2 and $3) or (id <> $2 and $4))",
        caller.user_id.as_uuid(),
        caller.session_id.as_uuid(),
        scope != RevocationScope::Others,
        scope != RevocationScope::This,
    )
    .execute(connection)
    .await?;
    Ok(())
}
