//! The statements on sessions. Each names the user, so that a caller cannot reach another
//! user's.

use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{NewSession, RevocationScope, RotationOutcome};
use crate::{
    auth::{MAX_SESSIONS, REFRESH_GRACE_PERIOD, Session, refresh_token::RefreshToken},
    database::{
        batch::{BatchQuery, by_ordinal},
        errors::is_foreign_key_violation,
    },
    rpc::{caller::SessionCaller, error::Error},
    types::id::{SessionId, UserId},
};

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

/// Inserts a session, if the password that was verified still is the current one and no operator
/// has disabled the user. The row of the user stays locked until the session is inserted, so that
/// a change of either comes before, and is seen, or after, and deletes the session.
pub(super) async fn insert_session(
    connection: &mut PgConnection,
    session: &NewSession,
    password_version: i64,
) -> Result<bool, Error> {
    let inserted = sqlx::query!(
        "insert into sessions (
             user_id, id, generation, rotated_at, expires_at, user_agent, peer
         )
         select $1, $3, 0, $4, $5, $6, $7
         from users where users.id = $1 and password_version = $2 and disabled_at is null
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
pub(super) async fn prune_sessions(
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
pub(super) struct FindSessionExpiry;

impl BatchQuery for FindSessionExpiry {
    type Input = SessionCaller;
    type Output = Option<OffsetDateTime>;

    async fn run_one(
        connection: &mut PgConnection,
        caller: &SessionCaller,
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
        callers: &[SessionCaller],
    ) -> Result<Vec<Option<Option<OffsetDateTime>>>, Error> {
        let (user_ids, ids): (Vec<_>, Vec<_>) = callers
            .iter()
            .map(|caller| (caller.user_id.as_uuid(), caller.session_id.as_uuid()))
            .unzip();
        let rows = sqlx::query!(
            r#"select ordinal as "ordinal!", expires_at
               from unnest($1::uuid[], $2::uuid[]) with ordinality
                   as inputs (user_id, id, ordinal)
               join sessions using (user_id, id)"#,
            &user_ids,
            &ids,
        )
        .fetch_all(connection)
        .await?;
        let found = rows.into_iter().map(|row| (row.ordinal, Ok(row.expires_at)));
        Ok(by_ordinal(callers.len(), found))
    }
}

/// One UPDATE that decides on the row itself: it waits for another rotation of the same session,
/// and then sees what that one left.
pub(super) async fn rotate(
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

/// Deletes sessions of the caller.
pub(super) async fn delete_sessions(
    connection: &mut PgConnection,
    caller: SessionCaller,
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

/// Deletes an active session of a user. Returns `true` if there was one.
pub(super) async fn delete_session(
    connection: &mut PgConnection,
    user_id: UserId,
    session_id: SessionId,
    now: OffsetDateTime,
) -> Result<bool, Error> {
    let deleted = sqlx::query!(
        "delete from sessions where user_id = $1 and id = $2 and expires_at > $3",
        user_id.as_uuid(),
        session_id.as_uuid(),
        now,
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// Lists a user's active sessions, newest first.
pub(super) async fn list_sessions(
    connection: &mut PgConnection,
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
    .fetch_all(connection)
    .await?;
    Ok(rows.into_iter().map(Session::from).collect())
}
