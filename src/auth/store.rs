//! The statements on sessions, and on the passwords of users. The user stands in every
//! one on sessions, so that another user's cannot be found.

use sqlx::{Connection, PgConnection, PgExecutor};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{LoginName, MAX_SESSIONS, NewSession, REFRESH_GRACE, Session, token::RefreshToken};
use crate::{
    caller::Caller,
    coalesce::{Statement, in_order},
    database::is_foreign_key_violation,
    error::Error,
    password::PasswordHash,
    types::id::{SessionId, UserId},
};

/// What is needed to check a user's password.
#[derive(Debug)]
pub(super) struct Credentials {
    pub(super) user_id: UserId,
    pub(super) username: String,
    pub(super) email: String,
    pub(super) password: PasswordHash,
    /// Names the password: a rehash keeps it, a change raises it.
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

/// Looks up the user who logs in by a name. For a name that nobody can have it asks all
/// the same, so that it takes as long.
pub(super) async fn find_credentials(
    executor: impl PgExecutor<'_>,
    name: &LoginName,
) -> Result<Option<Credentials>, Error> {
    let row = match name {
        LoginName::Email(email) => {
            sqlx::query_as!(
                CredentialsRow,
                "select id, username, email, password_hash, password_version
                 from users where email_folded = $1",
                email,
            )
            .fetch_optional(executor)
            .await?
        }
        LoginName::Username(_) | LoginName::Nobody => {
            let username = if let LoginName::Username(username) = name { username } else { "" };
            sqlx::query_as!(
                CredentialsRow,
                "select id, username, email, password_hash, password_version
                 from users where username_folded = $1",
                username,
            )
            .fetch_optional(executor)
            .await?
        }
    };
    Ok(row.map(Credentials::from))
}

/// Looks up the credentials of a user.
pub(super) async fn find_own_credentials(
    executor: impl PgExecutor<'_>,
    user_id: UserId,
) -> Result<Option<Credentials>, Error> {
    let row = sqlx::query_as!(
        CredentialsRow,
        "select id, username, email, password_hash, password_version from users where id = $1",
        user_id.as_uuid(),
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(Credentials::from))
}

/// Replaces the hash of a password by another of the same password, if it still is the
/// one that was verified.
pub(super) async fn rehash(
    executor: impl PgExecutor<'_>,
    verified: &Credentials,
    hash: &PasswordHash,
) -> Result<(), Error> {
    sqlx::query!(
        "update users set password_hash = $3 where id = $1 and password_hash = $2",
        verified.user_id.as_uuid(),
        verified.password.as_str(),
        hash.as_str(),
    )
    .execute(executor)
    .await?;
    Ok(())
}

/// Opens a session, if the password that was verified still is the user's. The row of
/// the user stays locked until the session is there, so that a change of the password
/// comes before, and is seen, or after, and ends the session.
pub(super) async fn open(
    executor: impl PgExecutor<'_>,
    session: &NewSession,
    password_version: i64,
) -> Result<bool, Error> {
    let opened = sqlx::query!(
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
    .execute(executor)
    .await;
    match opened {
        Ok(opened) => Ok(opened.rows_affected() > 0),
        // The user was deleted at this moment.
        Err(error) if is_foreign_key_violation(&error, "sessions_user_id_fkey") => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Removes a user's expired sessions, and the oldest of more than [`MAX_SESSIONS`].
/// Whether there were any.
///
/// It runs after a session was opened, not with it: whoever opens one of several at
/// the same time and trims last sees them all.
pub(super) async fn trim(
    executor: impl PgExecutor<'_>,
    user_id: UserId,
    now: OffsetDateTime,
) -> Result<bool, Error> {
    let ended = sqlx::query!(
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
    .execute(executor)
    .await?;
    Ok(ended.rows_affected() > 0)
}

/// Finds out when sessions expire; `None` for those that have ended.
#[derive(Debug)]
pub struct FindExpiry;

impl Statement for FindExpiry {
    type Question = Caller;
    type Answer = Option<OffsetDateTime>;

    async fn one(
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

    async fn many(
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
        Ok(in_order(callers.len(), found))
    }
}

/// What a refresh token was found to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Rotation {
    /// The current one, or its direct predecessor within the grace: its successor has
    /// this generation and expiry.
    Successor { generation: i32, expires_at: OffsetDateTime },
    /// One that was used before. Its session is to be ended.
    Reused,
    /// Its session has expired.
    Expired,
    /// Its session has ended.
    Ended,
}

/// Uses a refresh token up, if it is the current one.
///
/// One UPDATE that decides on the row itself: it waits for another rotation of the same
/// session and then sees what that one left.
pub(super) async fn rotate(
    executor: impl PgExecutor<'_>,
    token: RefreshToken,
    now: OffsetDateTime,
    expires_at: OffsetDateTime,
) -> Result<Rotation, Error> {
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
    .fetch_optional(executor)
    .await?;
    let Some(row) = row else {
        return Ok(Rotation::Ended);
    };
    if row.expires_at <= now {
        return Ok(Rotation::Expired);
    }
    let is_predecessor = token.generation.checked_add(1) == Some(row.generation);
    if is_predecessor && now < row.rotated_at + REFRESH_GRACE {
        return Ok(Rotation::Successor { generation: row.generation, expires_at: row.expires_at });
    }
    Ok(Rotation::Reused)
}

/// Which sessions of the caller to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    This,
    Others,
    All,
}

/// Ends sessions of the caller.
pub(super) async fn end(
    executor: impl PgExecutor<'_>,
    caller: Caller,
    which: Ending,
) -> Result<(), Error> {
    sqlx::query!(
        "delete from sessions
         where user_id = $1 and ((id = $2 and $3) or (id <> $2 and $4))",
        caller.user_id.as_uuid(),
        caller.session_id.as_uuid(),
        which != Ending::Others,
        which != Ending::This,
    )
    .execute(executor)
    .await?;
    Ok(())
}

/// Ends one live session of a user. Whether there was one.
pub(super) async fn revoke(
    executor: impl PgExecutor<'_>,
    user_id: UserId,
    session_id: SessionId,
    now: OffsetDateTime,
) -> Result<bool, Error> {
    let revoked = sqlx::query!(
        "delete from sessions where user_id = $1 and id = $2 and expires_at > $3",
        user_id.as_uuid(),
        session_id.as_uuid(),
        now,
    )
    .execute(executor)
    .await?;
    Ok(revoked.rows_affected() > 0)
}

struct SessionRow {
    id: Uuid,
    rotated_at: OffsetDateTime,
    expires_at: OffsetDateTime,
    user_agent: String,
    peer: String,
}

/// Lists a user's live sessions, the newest first.
pub(super) async fn list(
    executor: impl PgExecutor<'_>,
    user_id: UserId,
    now: OffsetDateTime,
) -> Result<Vec<Session>, Error> {
    let rows = sqlx::query_as!(
        SessionRow,
        "select id, rotated_at, expires_at, user_agent, peer
         from sessions where user_id = $1 and expires_at > $2
         order by id desc limit $3",
        user_id.as_uuid(),
        now,
        MAX_SESSIONS,
    )
    .fetch_all(executor)
    .await?;
    let session = |row: SessionRow| Session {
        id: SessionId::from_uuid(row.id),
        rotated_at: row.rotated_at,
        expires_at: row.expires_at,
        user_agent: row.user_agent,
        peer: row.peer,
    };
    Ok(rows.into_iter().map(session).collect())
}

/// Sets a password and ends all sessions but the caller's, if the password that was
/// verified still is the user's. Whether it was.
///
/// Two statements, because the second must see the sessions that were opened while the
/// first waited for the row. To be run to its end whatever becomes of the call.
pub(super) async fn change_password(
    connection: &mut PgConnection,
    caller: Caller,
    verified: &Credentials,
    hash: &PasswordHash,
) -> Result<bool, Error> {
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
    end(&mut *transaction, caller, Ending::Others).await?;
    transaction.commit().await?;
    Ok(true)
}
