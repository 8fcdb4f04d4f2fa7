//! The statements on users.

mod logins;
pub(crate) mod operator;

use std::time::Duration;

use sqlx::PgConnection;
use time::OffsetDateTime;
use uuid::Uuid;

use self::logins::{Logins, conflict_error};
use super::{NewUser, User, UserPatch, Username};
use crate::{
    crypto::password::PasswordHash,
    database::{
        Database,
        batch::{BatchQuery, QueryBatcher, by_ordinal},
        run_to_completion,
    },
    rpc::{
        error::Error,
        etag::{self, INITIAL_VERSION, Precondition},
        page_token::PageRequest,
    },
    types::{
        clock::Clock,
        email::{Email, EmailKey},
        id::UserId,
    },
};

/// The statements on users.
#[derive(Debug)]
pub(crate) struct UserStore {
    database: Database,
    find: QueryBatcher<FindUsers>,
}

struct UserRow {
    id: Uuid,
    username: String,
    email: String,
    updated_at: OffsetDateTime,
    version: i64,
}

impl From<UserRow> for User {
    fn from(row: UserRow) -> Self {
        Self {
            id: UserId::from_uuid(row.id),
            username: row.username,
            email: row.email,
            updated_at: row.updated_at,
            version: row.version,
        }
    }
}

/// A page of users.
#[derive(Debug)]
pub(super) struct UserPage {
    pub(super) users: Vec<User>,
    /// Whether more users follow.
    pub(super) has_more: bool,
}

impl UserStore {
    /// Creates the store. `deadline` is the longest time for which a batched query waits.
    pub(crate) fn new(database: Database, batching: bool, deadline: Duration) -> Self {
        let find = QueryBatcher::new(database.clone(), batching, deadline);
        Self { database, find }
    }

    /// Returns the clock of all times in the rows.
    pub(super) fn clock(&self) -> &Clock {
        self.database.clock()
    }

    /// Inserts a user, and then calls `on_created`, whether or not the call still waits.
    ///
    /// # Errors
    /// [`Error::UsernameExists`] or [`Error::EmailExists`].
    pub(super) async fn create(
        &self,
        user: NewUser,
        password: PasswordHash,
        on_created: impl FnOnce(&User) + Send + 'static,
    ) -> Result<User, Error> {
        let database = self.database.clone();
        run_to_completion(async move {
            let inserted =
                database.run(async |connection| insert(connection, &user, &password).await);
            inserted.await.inspect(on_created)
        })
        .await
    }

    /// Gets a user.
    pub(super) async fn get(&self, id: UserId) -> Result<Option<User>, Error> {
        self.find.run(id).await
    }

    /// Lists users by ID.
    pub(super) async fn list(&self, page: &PageRequest<UserId>) -> Result<UserPage, Error> {
        let rows = self
            .database
            .run(async |connection| {
                let rows = sqlx::query_as!(
                    UserRow,
                    "select id, username, email, updated_at, version
         from users where id > $1 order by id offset $2 limit $3",
                    page.after.map_or(Uuid::nil(), UserId::as_uuid),
                    page.skip,
                    // One more, to know whether there is one.
                    page.size + 1,
                )
                .fetch_all(connection)
                .await?;
                Ok(rows)
            })
            .await?;
        let size = usize::try_from(page.size).unwrap_or(usize::MAX);
        let has_more = rows.len() > size;
        Ok(UserPage { users: rows.into_iter().take(size).map(User::from).collect(), has_more })
    }

    /// Updates a user.
    ///
    /// # Errors
    /// [`Error::UserNotFound`] if the user does not exist, [`Error::EtagMismatch`],
    /// [`Error::UsernameExists`] or [`Error::EmailExists`].
    pub(super) async fn update(
        &self,
        id: UserId,
        precondition: Precondition,
        patch: &UserPatch,
    ) -> Result<User, Error> {
        let now = self.clock().now();
        self.database
            .run(async |connection| {
                let updated = update(connection, id, precondition, patch, now).await?;
                match updated {
                    Some(user) => Ok(user),
                    None => Err(precondition_error(connection, id).await?),
                }
            })
            .await
    }

    /// Deletes a user with all rows that the user owns, and then calls `on_deleted`, also if the
    /// outcome is unknown and if the call was dropped.
    ///
    /// # Errors
    /// [`Error::UserNotFound`] if the user does not exist, or [`Error::EtagMismatch`].
    pub(super) async fn delete(
        &self,
        id: UserId,
        precondition: Precondition,
        on_deleted: impl FnOnce(bool) + Send + 'static,
    ) -> Result<(), Error> {
        let database = self.database.clone();
        run_to_completion(async move {
            let deleted = database
                .run(async |connection| {
                    if delete(connection, id, precondition).await? {
                        return Ok(());
                    }
                    Err(precondition_error(connection, id).await?)
                })
                .await;
            on_deleted(deleted.is_ok());
            deleted
        })
        .await
    }
}

async fn insert(
    connection: &mut PgConnection,
    user: &NewUser,
    password: &PasswordHash,
) -> Result<User, Error> {
    let email = user.email.key();
    let logins = Logins { id: user.id, username: Some(&user.username), email: Some(&email) };
    logins.check_forms(connection).await?;
    let inserted = match insert_row(connection, user, &email, password).await {
        Err(error) => {
            logins.resolve_conflict(connection, error).await?;
            insert_row(connection, user, &email, password).await
        }
        inserted => inserted,
    };
    inserted.map(User::from).map_err(conflict_error)
}

async fn insert_row(
    connection: &mut PgConnection,
    user: &NewUser,
    email: &EmailKey,
    password: &PasswordHash,
) -> Result<UserRow, sqlx::Error> {
    sqlx::query_as!(
        UserRow,
        "insert into users (
             id, username, username_folded, email, email_folded,
             password_hash, password_version, updated_at, version
         ) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
         returning id, username, email, updated_at, version",
        user.id.as_uuid(),
        user.username.as_str(),
        user.username.folded(),
        user.email.as_str(),
        email.folded(),
        password.as_str(),
        INITIAL_VERSION,
        user.id.create_time(),
        INITIAL_VERSION,
    )
    .fetch_one(connection)
    .await
}

async fn find(connection: &mut PgConnection, id: UserId) -> Result<Option<User>, Error> {
    let row = sqlx::query_as!(
        UserRow,
        "select id, username, email, updated_at, version from users where id = $1",
        id.as_uuid(),
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(User::from))
}

/// Finds users by ID.
#[derive(Debug)]
struct FindUsers;

impl BatchQuery for FindUsers {
    type Input = UserId;
    type Output = Option<User>;

    async fn run_one(connection: &mut PgConnection, id: &UserId) -> Result<Option<User>, Error> {
        find(connection, *id).await
    }

    async fn run_batch(
        connection: &mut PgConnection,
        ids: &[UserId],
    ) -> Result<Vec<Option<Option<User>>>, Error> {
        let uuids: Vec<_> = ids.iter().copied().map(UserId::as_uuid).collect();
        let rows = sqlx::query!(
            r#"select ordinal as "ordinal!", users.id, username, email, updated_at, version
               from unnest($1::uuid[]) with ordinality as inputs (id, ordinal)
               join users using (id)"#,
            &uuids,
        )
        .fetch_all(connection)
        .await?;
        let users = rows.into_iter().map(|row| {
            let (id, username, email) = (row.id, row.username, row.email);
            let (updated_at, version) = (row.updated_at, row.version);
            (row.ordinal, Ok(UserRow { id, username, email, updated_at, version }.into()))
        });
        Ok(by_ordinal(ids.len(), users))
    }
}

/// Returns `None` if the user does not exist, or has another version than the required one.
async fn update(
    connection: &mut PgConnection,
    id: UserId,
    precondition: Precondition,
    patch: &UserPatch,
    now: OffsetDateTime,
) -> Result<Option<User>, Error> {
    let email = patch.email.as_ref().map(Email::key);
    let logins = Logins { id, username: patch.username.as_ref(), email: email.as_ref() };
    logins.check_forms(connection).await?;
    let updated = match update_row(connection, &logins, precondition, patch, now).await {
        Err(error) => {
            logins.resolve_conflict(connection, error).await?;
            update_row(connection, &logins, precondition, patch, now).await
        }
        updated => updated,
    };
    updated.map(|row| row.map(User::from)).map_err(conflict_error)
}

async fn update_row(
    connection: &mut PgConnection,
    logins: &Logins<'_>,
    precondition: Precondition,
    patch: &UserPatch,
    now: OffsetDateTime,
) -> Result<Option<UserRow>, sqlx::Error> {
    sqlx::query_as!(
        UserRow,
        "update users set
             username = coalesce($3, username),
             username_folded = coalesce($4, username_folded),
             email = coalesce($5, email),
             email_folded = coalesce($6, email_folded),
             updated_at = $7,
             version = version + 1
         where id = $1 and ($2::bigint is null or version = $2)
         returning id, username, email, updated_at, version",
        logins.id.as_uuid(),
        precondition.version(),
        logins.username.map(Username::as_str),
        logins.username.map(Username::folded),
        patch.email.as_ref().map(Email::as_str),
        logins.email.map(EmailKey::folded),
        now,
    )
    .fetch_optional(connection)
    .await
}

/// Returns `false` if the user does not exist, or has another version than the required one.
async fn delete(
    connection: &mut PgConnection,
    id: UserId,
    precondition: Precondition,
) -> Result<bool, Error> {
    let deleted = sqlx::query!(
        "delete from users where id = $1 and ($2::bigint is null or version = $2)",
        id.as_uuid(),
        precondition.version(),
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// Returns why a conditional write of the caller's own account changed nothing.
async fn precondition_error(connection: &mut PgConnection, id: UserId) -> Result<Error, Error> {
    let current = find(connection, id).await?.map(|user| etag::encode(user.version));
    Ok(Error::precondition("user", current, Error::UserNotFound))
}
