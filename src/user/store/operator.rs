//! The statements of operators on users.

use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    database::Database,
    rpc::{error::Error, etag::Precondition},
    telemetry::audit,
    types::id::UserId,
    user::operator::{Account, AccountCounts},
};

/// The number of users that a statement lists at most.
///
/// Test: `a_list_has_all_users_on_pages`.
pub(crate) const LIST_PAGE_SIZE: usize = 500;

/// What an operator sees of users, and their deletion.
#[derive(Clone, Debug)]
pub(crate) struct OperatorStore {
    database: Database,
}

struct AccountRow {
    id: Uuid,
    username: String,
    email: String,
    updated_at: OffsetDateTime,
    disabled_at: Option<OffsetDateTime>,
}

impl From<AccountRow> for Account {
    fn from(row: AccountRow) -> Self {
        Self {
            id: UserId::from_uuid(row.id),
            username: row.username,
            email: row.email,
            updated_at: row.updated_at,
            disabled_at: row.disabled_at,
        }
    }
}

impl OperatorStore {
    /// Creates the store.
    pub(crate) fn new(database: Database) -> Self {
        Self { database }
    }

    /// Lists up to [`LIST_PAGE_SIZE`] users by ID, after `after`, whose username or email address
    /// contains `query`, which is case-folded.
    pub(crate) async fn list(
        &self,
        after: Option<UserId>,
        query: Option<&str>,
    ) -> Result<Vec<Account>, Error> {
        self.database
            .run(async |connection| {
                let rows = sqlx::query_as!(
                    AccountRow,
                    "select id, username, email, updated_at, disabled_at
                     from users where id > $1 and (
                         $2::text is null
                         or strpos(username_folded, $2) > 0 or strpos(email_folded, $2) > 0
                     )
                     order by id limit $3",
                    after.map_or(Uuid::nil(), UserId::as_uuid),
                    query,
                    i64::try_from(LIST_PAGE_SIZE).unwrap_or(i64::MAX),
                )
                .fetch_all(connection)
                .await?;
                Ok(rows.into_iter().map(Account::from).collect())
            })
            .await
    }

    /// Finds the user with an ID.
    pub(crate) async fn find(&self, id: UserId) -> Result<Option<Account>, Error> {
        self.database
            .run(async |connection| {
                let row = sqlx::query_as!(
                    AccountRow,
                    "select id, username, email, updated_at, disabled_at
                     from users where id = $1",
                    id.as_uuid(),
                )
                .fetch_optional(connection)
                .await?;
                Ok(row.map(Account::from))
            })
            .await
    }

    /// Counts what a user has.
    pub(crate) async fn count(&self, id: UserId) -> Result<AccountCounts, Error> {
        let now = self.database.clock().now();
        self.database
            .run(async |connection| {
                let row = sqlx::query!(
                    r#"select
                           (select count(*) from todos where owner_id = $1) as "todos!",
                           (select count(*) from sessions
                               where user_id = $1 and expires_at > $2) as "sessions!",
                           (select count(*) from personal_access_tokens
                               where user_id = $1 and expires_at > $2) as "tokens!",
                           (select expires_at from password_reset_codes
                               where user_id = $1 and expires_at > $2) as reset_code_expires_at"#,
                    id.as_uuid(),
                    now,
                )
                .fetch_one(connection)
                .await?;
                Ok(AccountCounts {
                    todos: row.todos,
                    active_sessions: row.sessions,
                    personal_access_tokens: row.tokens,
                    reset_code_expires_at: row.reset_code_expires_at,
                })
            })
            .await
    }

    /// Deletes a user with all rows that the user owns. Returns `false` if the user does not exist.
    pub(crate) async fn delete(&self, id: UserId) -> Result<bool, Error> {
        let is_deleted = self
            .database
            .run(async |connection| super::delete(connection, id, Precondition::None).await)
            .await?;
        if is_deleted {
            audit::record("user_deleted", Some(id), None);
        }
        Ok(is_deleted)
    }
}
