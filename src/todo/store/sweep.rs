//! Purging the content of old deleted todos, and removing older tombstones.

use sqlx::PgConnection;

use crate::{rpc::error::Error, types::id::UserId};

/// The number of deleted todos that one statement looks at or changes, so that no statement holds
/// many locks, or takes long.
///
/// Test: `a_sweep_has_several_batches`.
const MAX_SWEEP_BATCH_LEN: i64 = 1_000;

/// The versions before which deletions are due, in microseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub(in crate::todo) struct Cutoffs {
    /// For the content.
    pub(in crate::todo) content: i64,
    /// For the tombstone.
    pub(in crate::todo) tombstone: i64,
}

/// How many deleted todos a statement changed.
#[derive(Debug)]
pub(in crate::todo) struct Swept {
    pub(in crate::todo) purged: u64,
    pub(in crate::todo) removed: u64,
}

/// Finds owners with deleted todos that are due. The one exception to the rule that statements name
/// the owner: it reads the index of all.
pub(in crate::todo) async fn find_due(
    connection: &mut PgConnection,
    cutoffs: Cutoffs,
) -> Result<Vec<UserId>, Error> {
    let owner_ids = sqlx::query_scalar!(
        "select distinct owner_id from (
             select owner_id from todo_trash
             where (case when title is null then version + 86400000000 else version end) < $1
             order by (case when title is null then version + 86400000000 else version end)
             limit $2
         ) as due",
        cutoffs.content,
        MAX_SWEEP_BATCH_LEN,
    );
    Ok(owner_ids.fetch_all(connection).await?.into_iter().map(UserId::from_uuid).collect())
}

/// Sweeps deleted todos of an owner, without those that another statement changes. Does not move
/// the clock: for callers, nothing changes that the purge time has not announced.
pub(in crate::todo) async fn sweep_owner(
    connection: &mut PgConnection,
    owner_id: UserId,
    cutoffs: Cutoffs,
) -> Result<Swept, Error> {
    let swept = sqlx::query!(
        r#"with removed as (
             delete from todo_trash where owner_id = $1 and id = any(array(
                 select id from todo_trash where owner_id = $1 and version < $2
                 order by version limit $4 for update skip locked
             ))
             returning id
         ), purged as (
             update todo_trash set
                 title = null, title_folded = null, description = null,
                 description_folded = null, state = null
             where owner_id = $1 and id = any(array(
                 select id from todo_trash
                 where owner_id = $1 and version >= $2 and version < $3 and title is not null
                 order by version limit $4 for update skip locked
             ))
             returning id
         )
         select (select count(*) from purged) as "purged!",
             (select count(*) from removed) as "removed!""#,
        owner_id.as_uuid(),
        cutoffs.tombstone,
        cutoffs.content,
        MAX_SWEEP_BATCH_LEN,
    );
    let swept = swept.fetch_one(connection).await?;
    let count = |count: i64| u64::try_from(count).unwrap_or_default();
    Ok(Swept { purged: count(swept.purged), removed: count(swept.removed) })
}
