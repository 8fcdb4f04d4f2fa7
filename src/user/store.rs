//! The statements on users.

use sqlx::{PgConnection, PgExecutor};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{NewUser, User, UserChange, Username};
use crate::{
    coalesce::{Statement, in_order},
    database::is_unique_violation,
    error::Error,
    etag::{FIRST_VERSION, Guard},
    pagination::Page,
    password::PasswordHash,
    types::id::UserId,
};

struct Row {
    id: Uuid,
    username: String,
    email: String,
    updated_at: OffsetDateTime,
    version: i64,
}

impl From<Row> for User {
    fn from(row: Row) -> Self {
        Self {
            id: UserId::from_uuid(row.id),
            username: row.username,
            email: row.email,
            updated_at: row.updated_at,
            version: row.version,
        }
    }
}

/// Adds a user. [`Error::UsernameExists`] or [`Error::EmailExists`].
pub(super) async fn insert(
    connection: &mut PgConnection,
    user: &NewUser,
    password: &PasswordHash,
) -> Result<User, Error> {
    let inserted = sqlx::query_as!(
        Row,
        "insert into users (
             id, username, username_folded, email, email_folded,
             password_hash, password_version, updated_at, version
         ) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         returning id, username, email, updated_at, version",
        user.id.as_uuid(),
        user.username.as_str(),
        user.username.folded(),
        user.email.as_str(),
        user.email.folded(),
        password.as_str(),
        FIRST_VERSION,
        user.id.create_time(),
        FIRST_VERSION,
    )
    .fetch_one(&mut *connection)
    .await;
    match inserted {
        Ok(row) => Ok(row.into()),
        Err(error) => Err(clash(connection, error, user.id, Some(&user.username)).await),
    }
}

/// Looks up a user.
pub(super) async fn find(executor: impl PgExecutor<'_>, id: UserId) -> Result<Option<User>, Error> {
    let row = sqlx::query_as!(
        Row,
        "select id, username, email, updated_at, version from users where id = $1",
        id.as_uuid(),
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(User::from))
}

/// Looks up users.
#[derive(Debug)]
pub struct Find;

impl Statement for Find {
    type Question = UserId;
    type Answer = Option<User>;

    async fn one(connection: &mut PgConnection, id: &UserId) -> Result<Option<User>, Error> {
        find(connection, *id).await
    }

    async fn many(
        connection: &mut PgConnection,
        ids: &[UserId],
    ) -> Result<Vec<Option<Option<User>>>, Error> {
        let questions: Vec<_> = ids.iter().copied().map(UserId::as_uuid).collect();
        let rows = sqlx::query!(
            r#"select question as "question!", users.id, username, email, updated_at, version
               from unnest($1::uuid[]) with ordinality as questions (id, question)
               join users using (id)"#,
            &questions,
        )
        .fetch_all(connection)
        .await?;
        let found = rows.into_iter().map(|row| {
            let (id, username, email) = (row.id, row.username, row.email);
            let (updated_at, version) = (row.updated_at, row.version);
            (row.question, Ok(Row { id, username, email, updated_at, version }.into()))
        });
        Ok(in_order(ids.len(), found))
    }
}

/// Lists users by id, one more than the page holds where there are more.
pub(super) async fn list(
    executor: impl PgExecutor<'_>,
    page: &Page<UserId>,
) -> Result<Vec<User>, Error> {
    let rows = sqlx::query_as!(
        Row,
        "select id, username, email, updated_at, version
         from users where id > $1 order by id offset $2 limit $3",
        page.after.map_or(Uuid::nil(), UserId::as_uuid),
        page.skip,
        page.size + 1,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(User::from).collect())
}

/// Changes a user. `None` if there is none, or none of the guarded version;
/// [`Error::UsernameExists`] or [`Error::EmailExists`].
pub(super) async fn update(
    connection: &mut PgConnection,
    id: UserId,
    guard: Guard,
    change: &UserChange,
    now: OffsetDateTime,
) -> Result<Option<User>, Error> {
    let (username, email) = (change.username.as_ref(), change.email.as_ref());
    let updated = sqlx::query_as!(
        Row,
        "update users set
             username = coalesce($3, username),
             username_folded = coalesce($4, username_folded),
             email = coalesce($5, email),
             email_folded = coalesce($6, email_folded),
             updated_at = $7,
             version = version + 1
         where id = $1 and ($2::bigint is null or version = $2)
         returning id, username, email, updated_at, version",
        id.as_uuid(),
        guard.version(),
        username.map(super::Username::as_str),
        username.map(super::Username::folded),
        email.map(super::Email::as_str),
        email.map(super::Email::folded),
        now,
    )
    .fetch_optional(&mut *connection)
    .await;
    match updated {
        Ok(row) => Ok(row.map(User::from)),
        Err(error) => Err(clash(connection, error, id, username).await),
    }
}

/// Deletes a user with everything that is theirs. Whether there was one, of the
/// guarded version.
pub(super) async fn delete(
    executor: impl PgExecutor<'_>,
    id: UserId,
    guard: Guard,
) -> Result<bool, Error> {
    let deleted = sqlx::query!(
        "delete from users where id = $1 and ($2::bigint is null or version = $2)",
        id.as_uuid(),
        guard.version(),
    )
    .execute(executor)
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// Why a username or an address was refused. The username is named first when both are
/// taken; which of them the database finds first depends on when their indexes were
/// built.
async fn clash(
    executor: impl PgExecutor<'_>,
    error: sqlx::Error,
    id: UserId,
    username: Option<&Username>,
) -> Error {
    if is_unique_violation(&error, "users_username_key") {
        return Error::UsernameExists;
    }
    if !is_unique_violation(&error, "users_email_key") {
        return error.into();
    }
    let Some(username) = username else {
        return Error::EmailExists;
    };
    let taken = sqlx::query_scalar!(
        r#"select exists (
               select from users where username_folded = $1 and id <> $2
           ) as "taken!""#,
        username.folded(),
        id.as_uuid(),
    )
    .fetch_one(executor)
    .await;
    match taken {
        Ok(true) => Error::UsernameExists,
        Ok(false) => Error::EmailExists,
        Err(error) => error.into(),
    }
}
