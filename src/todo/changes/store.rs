//! The statements on changes.

use sqlx::PgConnection;
use uuid::Uuid;

use super::{Change, ChangePage, Present, StartAt};
use crate::{
    database::Database,
    rpc::error::Error,
    todo::{
        DeletedTodo, Todo, TodoContent, content_cutoff,
        list::{MAX_PAGE_BYTES, TODO_OVERHEAD_BYTES},
        row::DeletedTodoRow,
    },
    types::id::UserId,
};

/// The size of a change besides the texts of its todo, in bytes: that of a todo, two more times, and
/// the frames around them.
///
/// Test: `pages_of_changes_stay_below_1_mib`.
const CHANGE_OVERHEAD_BYTES: i32 = TODO_OVERHEAD_BYTES + 48;

/// The maximum number of changes in a message of a watch.
///
/// Test: `a_message_of_a_watch_has_at_most_a_hundred_changes_and_256_kib`.
const MAX_WATCH_PAGE_SIZE: i64 = 100;

/// The maximum size of the changes in a message of a watch, in bytes. A single one may be larger
/// than what is left.
///
/// Test: `a_message_of_a_watch_has_at_most_a_hundred_changes_and_256_kib`.
pub(super) const MAX_WATCH_PAGE_BYTES: i64 = 256 * 1024;

/// The maximum size of the changes in the first message of a watch, in bytes. It doubles with each
/// further one, so that a watch whose client resets it at once costs little.
///
/// Test: `a_message_of_a_watch_has_at_most_a_hundred_changes_and_256_kib`.
pub(super) const FIRST_WATCH_PAGE_BYTES: i64 = MAX_WATCH_PAGE_BYTES / 8;

/// The limits of a page. It has at least one change, if there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageLimits {
    size: i64,
    bytes: i64,
}

impl PageLimits {
    /// Returns the limits of a message of a watch with at most `bytes`.
    pub(super) const fn message(bytes: i64) -> Self {
        Self { size: MAX_WATCH_PAGE_SIZE, bytes }
    }

    /// Returns the limits of a response with at most `size` changes.
    pub(super) const fn response(size: i64) -> Self {
        Self { size, bytes: MAX_PAGE_BYTES }
    }
}

/// Reads the changes of owners.
#[derive(Clone, Debug)]
pub(super) struct ChangeStore {
    database: Database,
}

impl ChangeStore {
    pub(super) fn new(database: Database) -> Self {
        Self { database }
    }

    /// Returns the current time, in microseconds since 1970, by the clock of all times in the rows.
    pub(super) fn now(&self) -> i64 {
        self.database.clock().now_micros()
    }

    /// Reads the next changes of an owner. Drops `guard` when the statement has ended, also if the
    /// future is dropped.
    ///
    /// # Errors
    /// [`Error::CursorExpired`] if the database does not have the history of the cursor.
    pub(super) async fn read(
        &self,
        owner_id: UserId,
        start: StartAt,
        limits: PageLimits,
        guard: impl Send + 'static,
    ) -> Result<ChangePage, Error> {
        // Before the statement, so that the age of the cursor is never too low.
        let now = self.now();
        let read = self.database.run_guarded(guard, async |connection| {
            read(connection, owner_id, start.version(), limits, now).await
        });
        let (present, changes, has_more) = read.await?;
        start.check(present)?;
        Ok(start.page(present, changes, has_more, now))
    }

    /// Reads the clocks of owners: those that have one, each with its version.
    pub(super) async fn poll(&self, owner_ids: &[Uuid]) -> Result<Poll, Error> {
        let at = self.now();
        let read = self.database.run(async |connection| poll(connection, owner_ids).await);
        let (incarnation, clocks) = read.await?;
        Ok(Poll { at, incarnation, clocks })
    }
}

/// One statement, so that PostgreSQL reads all of it from one snapshot, also at READ COMMITTED.
///
/// A write takes the clock of its owner first, and holds it until it has committed, when its rows
/// are visible. So the rows that a snapshot shows are all changes up to the version of the clock
/// that it shows, and no change after it: the version is a cursor.
async fn read(
    connection: &mut PgConnection,
    owner_id: UserId,
    after: i64,
    limits: PageLimits,
    now: i64,
) -> Result<(Present, Vec<Change>, bool), Error> {
    let rows = sqlx::query!(
        r#"select clock as "clock!", incarnation as "incarnation!", id as "id?",
             title as "title?", description as "description?", state as "state?",
             version as "version?", is_deleted as "is_deleted?", candidates as "candidates?"
         from (
             select (select id from database_incarnation) as incarnation,
                 coalesce((select version from todo_clocks where owner_id = $1), 0) as clock
         ) as present
         left join (
             select *,
                 count(*) over () as candidates,
                 row_number() over running as position,
                 sum(coalesce(octet_length(title) + octet_length(description), 0) + $5::int)
                     over running as bytes
             from (
                 (
                     select id, title, description, state, version, false as is_deleted
                     from todos where owner_id = $1 and version > $2
                     order by version limit $3
                 )
                 union all
                 (
                     select id, title, description, state, version, true
                     from todo_trash where owner_id = $1 and version > $2
                     order by version limit $3
                 )
                 order by version limit $3
             ) as page_rows
             window running as (order by version rows unbounded preceding)
         ) as measured on position = 1 or bytes <= $4
         order by position"#,
        owner_id.as_uuid(),
        after,
        // One more, to know whether there is one.
        limits.size + 1,
        limits.bytes,
        CHANGE_OVERHEAD_BYTES,
    )
    .fetch_all(connection)
    .await?;
    let first = rows.first().ok_or_else(|| Error::internal("the changes have no clock"))?;
    let present = Present { version: first.clock, incarnation: first.incarnation };
    let candidates = first.candidates.unwrap_or_default();
    let size = usize::try_from(limits.size).unwrap_or(usize::MAX);
    let mut changes = Vec::with_capacity(rows.len());
    for row in rows.into_iter().take(size) {
        let (Some(id), Some(version)) = (row.id, row.version) else { continue };
        let (title, description, state) = (row.title, row.description, row.state);
        let is_deleted = row.is_deleted.unwrap_or_default();
        let row = DeletedTodoRow { id, title, description, state, version };
        changes.push(change(row, is_deleted, now)?);
    }
    let has_more = usize::try_from(candidates).is_ok_and(|all| all > changes.len());
    Ok((present, changes, has_more))
}

/// Returns the change of a row of either table, as callers see it at this time.
fn change(row: DeletedTodoRow, is_deleted: bool, now: i64) -> Result<Change, Error> {
    let DeletedTodo { id, content, version } = row.try_into()?;
    if is_deleted {
        // The sweep may come later than the purge time.
        let content = content.filter(|_| version > content_cutoff(now));
        return Ok(Change::Deleted(DeletedTodo { id, content, version }));
    }
    let content = content.ok_or_else(|| Error::internal("a todo has no content"))?;
    let TodoContent { title, description, state } = content;
    Ok(Change::Todo(Todo { id, title, description, state, version }))
}

/// The clocks of watched owners.
#[derive(Debug)]
pub(super) struct Poll {
    /// A time before the poll, in microseconds since 1970.
    pub(super) at: i64,
    pub(super) incarnation: Uuid,
    /// Owners with their versions.
    pub(super) clocks: Vec<(Uuid, i64)>,
}

/// The one statement of the service that names several owners in a condition.
async fn poll(
    connection: &mut PgConnection,
    owner_ids: &[Uuid],
) -> Result<(Uuid, Vec<(Uuid, i64)>), Error> {
    let rows = sqlx::query!(
        r#"select incarnation.id as "incarnation!", owner_id as "owner_id?", version as "version?"
         from database_incarnation as incarnation
         left join todo_clocks on owner_id = any($1)"#,
        owner_ids,
    )
    .fetch_all(connection)
    .await?;
    let first = rows.first().ok_or_else(|| Error::internal("the database has no incarnation"))?;
    let incarnation = first.incarnation;
    let clocks = rows.into_iter().filter_map(|row| row.owner_id.zip(row.version)).collect();
    Ok((incarnation, clocks))
}
