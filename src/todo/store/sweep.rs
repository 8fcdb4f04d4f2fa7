//! Purging the content of old deleted todos, and removing older tombstones.

use sqlx::PgConnection;

use crate::{rpc::error::Error, types::id::UserId};

/// The number of deleted todos that one statement reads or changes, so that no statement holds many
/// locks, or takes long.
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

/// Owners with deleted todos that are due.
#[derive(Debug)]
pub(in crate::todo) struct DueOwners {
    pub(in crate::todo) owner_ids: Vec<UserId>,
    /// The position of the next batch; `None` if nothing is due.
    pub(in crate::todo) next: Option<i64>,
}

/// How many deleted todos a statement changed.
#[derive(Debug)]
pub(in crate::todo) struct Swept {
    /// Those whose content is purged, also if nothing of them is left.
    pub(in crate::todo) purged: u64,
    /// Those of which nothing is left.
    pub(in crate::todo) removed: u64,
    /// Whether the statement changed as many as it may.
    pub(in crate::todo) is_full: bool,
}

/// Finds the next owners with deleted todos that are due, after the position `after`: todos that
/// another transaction locks, or that cannot be swept, do not hold up the others. The one exception
/// to the rule that statements name the owner: it reads the index of all.
pub(in crate::todo) async fn find_due(
    connection: &mut PgConnection,
    cutoffs: Cutoffs,
    after: i64,
) -> Result<DueOwners, Error> {
    // With ties: the position of the next batch is a time, which several owners can have.
    let rows = sqlx::query!(
        r#"select owner_id, max(due) as "due!" from (
             select owner_id,
                 (case when title is null then version + 86400000000 else version end) as due
             from todo_trash
             where (case when title is null then version + 86400000000 else version end) < $1
                 and (case when title is null then version + 86400000000 else version end) > $3
             order by (case when title is null then version + 86400000000 else version end)
             fetch first ($2) rows with ties
         ) as batch
         group by owner_id"#,
        cutoffs.content,
        MAX_SWEEP_BATCH_LEN,
        after,
    );
    let rows = rows.fetch_all(connection).await?;
    Ok(DueOwners {
        next: rows.iter().map(|row| row.due).max(),
        owner_ids: rows.into_iter().map(|row| UserId::from_uuid(row.owner_id)).collect(),
    })
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
             returning title is not null as had_content
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
             (select count(*) from removed) as "removed!",
             (select count(*) from removed where had_content) as "removed_with_content!""#,
        owner_id.as_uuid(),
        cutoffs.tombstone,
        cutoffs.content,
        MAX_SWEEP_BATCH_LEN,
    );
    let swept = swept.fetch_one(connection).await?;
    let count = |count: i64| u64::try_from(count).unwrap_or_default();
    Ok(Swept {
        purged: count(swept.purged + swept.removed_with_content),
        removed: count(swept.removed),
        is_full: swept.purged.max(swept.removed) >= MAX_SWEEP_BATCH_LEN,
    })
}
