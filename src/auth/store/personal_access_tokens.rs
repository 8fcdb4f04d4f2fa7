//! The statements on personal access tokens. Each names the user, so that a caller cannot reach
//! another user's.

use sqlx::{Connection, PgConnection};
use time::{Date, OffsetDateTime};
use uuid::Uuid;

use super::AuthStore;
use crate::{
    auth::personal_access_tokens::{
        MAX_EXPIRED_TOKENS, MAX_UNEXPIRED_TOKENS, NewPersonalAccessToken, PersonalAccessToken,
        StoredToken,
    },
    crypto::random_secret::SecretHash,
    database::batch::{BatchQuery, by_ordinal},
    rpc::error::Error,
    types::id::{PersonalAccessTokenId, UserId},
};

/// The result of a creation.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::auth) enum TokenCreation {
    Created,
    /// The user has [`MAX_UNEXPIRED_TOKENS`] already.
    LimitReached,
    /// The password that was verified is not the current one any more, or the user is disabled or
    /// does not exist.
    Outdated,
}

impl AuthStore {
    /// Finds a personal access token, also if it has expired.
    pub(in crate::auth) async fn find_token(
        &self,
        user_id: UserId,
        id: PersonalAccessTokenId,
    ) -> Result<Option<StoredToken>, Error> {
        self.token.run((user_id, id)).await
    }

    /// Returns which personal access tokens exist, in order, with one statement.
    pub(in crate::auth) async fn do_tokens_exist(
        &self,
        tokens: &[(UserId, PersonalAccessTokenId)],
    ) -> Result<Vec<bool>, Error> {
        let found =
            self.database.run(async |connection| FindToken::run_batch(connection, tokens).await);
        Ok(found.await?.into_iter().map(|found| found.flatten().is_some()).collect())
    }

    /// Creates a personal access token, if the password that was verified still is the current one
    /// and the user is not disabled. The caller of this method runs it to completion.
    pub(in crate::auth) async fn create_token(
        &self,
        token: &NewPersonalAccessToken,
        password_version: i64,
    ) -> Result<TokenCreation, Error> {
        self.database
            .run(async |connection| create(connection, token, password_version).await)
            .await
    }

    /// Lists a user's personal access tokens, the newest first.
    pub(in crate::auth) async fn list_tokens(
        &self,
        user_id: UserId,
    ) -> Result<Vec<PersonalAccessToken>, Error> {
        self.database.run(async |connection| list(connection, user_id).await).await
    }

    /// Deletes a personal access token of a user. Returns `true` if there was one.
    pub(in crate::auth) async fn delete_token(
        &self,
        user_id: UserId,
        id: PersonalAccessTokenId,
    ) -> Result<bool, Error> {
        self.database.run(async |connection| delete(connection, user_id, id).await).await
    }

    /// Stores the day on which a personal access token was used.
    pub(in crate::auth) async fn record_token_use(
        &self,
        user_id: UserId,
        id: PersonalAccessTokenId,
        date: Date,
    ) -> Result<(), Error> {
        self.database.run(async |connection| record_use(connection, user_id, id, date).await).await
    }
}

struct StoredTokenRow {
    user_id: Uuid,
    id: Uuid,
    secret_hash: Vec<u8>,
    scopes: Vec<String>,
    expires_at: OffsetDateTime,
    last_used_date: Option<Date>,
}

impl TryFrom<StoredTokenRow> for StoredToken {
    type Error = Error;

    fn try_from(row: StoredTokenRow) -> Result<Self, Error> {
        let hash = SecretHash::from_stored(&row.secret_hash);
        Ok(Self {
            user_id: UserId::from_uuid(row.user_id),
            id: PersonalAccessTokenId::from_uuid(row.id),
            secret_hash: hash.ok_or_else(|| Error::internal("a stored hash has another length"))?,
            scopes: row.scopes,
            expires_at: row.expires_at,
            last_used_date: row.last_used_date,
            is_use_recorded: false.into(),
        })
    }
}

/// Finds tokens, also those that have expired; `None` for those that do not exist.
#[derive(Debug)]
pub(super) struct FindToken;

impl BatchQuery for FindToken {
    type Input = (UserId, PersonalAccessTokenId);
    type Output = Option<StoredToken>;

    async fn run_one(
        connection: &mut PgConnection,
        (user_id, id): &Self::Input,
    ) -> Result<Option<StoredToken>, Error> {
        let row = sqlx::query_as!(
            StoredTokenRow,
            "select user_id, id, secret_hash, scopes, expires_at, last_used_date
             from personal_access_tokens where user_id = $1 and id = $2",
            user_id.as_uuid(),
            id.as_uuid(),
        )
        .fetch_optional(connection)
        .await?;
        row.map(StoredToken::try_from).transpose()
    }

    async fn run_batch(
        connection: &mut PgConnection,
        inputs: &[Self::Input],
    ) -> Result<Vec<Option<Option<StoredToken>>>, Error> {
        let (user_ids, ids): (Vec<_>, Vec<_>) =
            inputs.iter().map(|(user_id, id)| (user_id.as_uuid(), id.as_uuid())).unzip();
        let rows = sqlx::query!(
            r#"select ordinal as "ordinal!", user_id as "user_id!", id as "id!", secret_hash, scopes,
                   expires_at, last_used_date
               from unnest($1::uuid[], $2::uuid[]) with ordinality
                   as inputs (user_id, id, ordinal)
               join personal_access_tokens using (user_id, id)"#,
            &user_ids,
            &ids,
        )
        .fetch_all(connection)
        .await?;
        let found = rows.into_iter().map(|row| {
            let token = StoredTokenRow {
                user_id: row.user_id,
                id: row.id,
                secret_hash: row.secret_hash,
                scopes: row.scopes,
                expires_at: row.expires_at,
                last_used_date: row.last_used_date,
            };
            (row.ordinal, token.try_into())
        });
        Ok(by_ordinal(inputs.len(), found))
    }
}

/// Inserts a token, unless the user has [`MAX_UNEXPIRED_TOKENS`], and deletes the oldest expired
/// ones beyond [`MAX_EXPIRED_TOKENS`].
///
/// The row of the user stays locked until the end, so that creations of one user count each other,
/// and a change of the password comes before, and is seen, or after.
async fn create(
    connection: &mut PgConnection,
    token: &NewPersonalAccessToken,
    password_version: i64,
) -> Result<TokenCreation, Error> {
    let mut transaction = connection.begin().await?;
    if !lock_user(&mut transaction, token.user_id, password_version).await? {
        transaction.rollback().await?;
        return Ok(TokenCreation::Outdated);
    }
    if count_unexpired(&mut transaction, token.user_id, token.now).await? >= MAX_UNEXPIRED_TOKENS {
        transaction.rollback().await?;
        return Ok(TokenCreation::LimitReached);
    }
    insert(&mut transaction, token).await?;
    prune(&mut transaction, token.user_id, token.now).await?;
    transaction.commit().await?;
    Ok(TokenCreation::Created)
}

async fn lock_user(
    connection: &mut PgConnection,
    user_id: UserId,
    password_version: i64,
) -> Result<bool, Error> {
    let locked = sqlx::query_scalar!(
        "select id from users
         where id = $1 and password_version = $2 and disabled_at is null
         for no key update",
        user_id.as_uuid(),
        password_version,
    )
    .fetch_optional(connection)
    .await?;
    Ok(locked.is_some())
}

async fn count_unexpired(
    connection: &mut PgConnection,
    user_id: UserId,
    now: OffsetDateTime,
) -> Result<i64, Error> {
    let count = sqlx::query_scalar!(
        r#"select count(*) as "count!" from personal_access_tokens
           where user_id = $1 and expires_at > $2"#,
        user_id.as_uuid(),
        now,
    )
    .fetch_one(connection)
    .await?;
    Ok(count)
}

async fn insert(
    connection: &mut PgConnection,
    token: &NewPersonalAccessToken,
) -> Result<(), Error> {
    sqlx::query!(
        "insert into personal_access_tokens (user_id, id, name, scopes, expires_at, secret_hash)
         values ($1, $2, $3, $4, $5, $6)",
        token.user_id.as_uuid(),
        token.id.as_uuid(),
        token.details.name,
        &token.details.scopes as &[&str],
        token.details.expires_at,
        token.secret_hash.as_bytes(),
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn prune(
    connection: &mut PgConnection,
    user_id: UserId,
    now: OffsetDateTime,
) -> Result<(), Error> {
    sqlx::query!(
        "delete from personal_access_tokens
         where user_id = $1 and id in (
             select id from personal_access_tokens
             where user_id = $1 and expires_at <= $2
             order by id desc offset $3
         )",
        user_id.as_uuid(),
        now,
        MAX_EXPIRED_TOKENS,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Lists a user's tokens, the newest first.
async fn list(
    connection: &mut PgConnection,
    user_id: UserId,
) -> Result<Vec<PersonalAccessToken>, Error> {
    let rows = sqlx::query!(
        "select id, name, scopes, expires_at, last_used_date
         from personal_access_tokens where user_id = $1
         order by id desc limit $2",
        user_id.as_uuid(),
        MAX_UNEXPIRED_TOKENS + MAX_EXPIRED_TOKENS,
    )
    .fetch_all(connection)
    .await?;
    let tokens = rows.into_iter().map(|row| PersonalAccessToken {
        id: PersonalAccessTokenId::from_uuid(row.id),
        name: row.name,
        scopes: row.scopes,
        expires_at: row.expires_at,
        last_used_date: row.last_used_date,
    });
    Ok(tokens.collect())
}

/// Deletes a token of a user, also if it has expired. Returns `true` if there was one.
async fn delete(
    connection: &mut PgConnection,
    user_id: UserId,
    id: PersonalAccessTokenId,
) -> Result<bool, Error> {
    let deleted = sqlx::query!(
        "delete from personal_access_tokens where user_id = $1 and id = $2",
        user_id.as_uuid(),
        id.as_uuid(),
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// Stores the day of a use, unless the row has that day or a later one.
async fn record_use(
    connection: &mut PgConnection,
    user_id: UserId,
    id: PersonalAccessTokenId,
    date: Date,
) -> Result<(), Error> {
    sqlx::query!(
        "update personal_access_tokens set last_used_date = $3
         where user_id = $1 and id = $2 and (last_used_date is null or last_used_date < $3)",
        user_id.as_uuid(),
        id.as_uuid(),
        date,
    )
    .execute(connection)
    .await?;
    Ok(())
}
