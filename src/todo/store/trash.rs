//! Deleting todos, restoring and purging them, and listing the deleted ones.
//!
//! A deleted todo is a row of `todo_trash` until the sweep removes it ([`super::sweep`]). From its
//! purge time on, it counts as purged, whether the sweep has purged its content yet or not.

use sqlx::PgConnection;

use super::precondition_error;
use crate::{
    rpc::{
        error::Error,
        etag::{self, Precondition},
        page_token::PageRequest,
    },
    todo::{
        DeletedTodo, Todo, content_cutoff,
        list::{MAX_PAGE_BYTES, TODO_OVERHEAD_BYTES},
        order::DeletedTodoCursor,
        row::{DeletedTodoRow, TodoRow},
    },
    types::id::{TodoId, UserId},
};

/// The size of a deleted todo besides its texts, in bytes: that of a todo and two more times.
///
/// Test: `pages_of_deleted_todos_stay_below_1_mib`.
const DELETED_TODO_OVERHEAD_BYTES: i32 = TODO_OVERHEAD_BYTES + 40;

/// A page of deleted todos.
#[derive(Debug)]
pub(in crate::todo) struct DeletedTodoPage {
    pub(in crate::todo) deleted_todos: Vec<DeletedTodo>,
    /// Whether more deleted todos follow.
    pub(in crate::todo) has_more: bool,
}

/// A todo of an owner, as the statements of this module select it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) owner_id: UserId,
    pub(super) id: TodoId,
    pub(super) precondition: Precondition,
    /// The current time, in microseconds since 1970.
    pub(super) now: i64,
}

/// Moves a todo to the trash.
///
/// # Errors
/// [`Error::TodoNotFound`] or [`Error::EtagMismatch`].
pub(super) async fn delete(
    connection: &mut PgConnection,
    target: Target,
) -> Result<DeletedTodo, Error> {
    let Target { owner_id, id, precondition, now } = target;
    let row = sqlx::query_as!(
        DeletedTodoRow,
        "with clock as (
             update todo_clocks set version = greatest(version + 1, $4)
             where owner_id = $1 and exists (
                 select from todos
                 where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
             )
             returning version as tick
         ), deleted as (
             delete from todos using clock
             where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
             returning title, title_folded, description, description_folded, state, tick
         )
         insert into todo_trash as trash (
             owner_id, id, title, title_folded, description, description_folded, state, version
         )
         select $1, $2, title, title_folded, description, description_folded, state, tick
         from deleted
         returning trash.id, trash.title, trash.description, trash.state, trash.version",
        owner_id.as_uuid(),
        id.as_uuid(),
        precondition.version(),
        now,
    )
    .fetch_optional(&mut *connection)
    .await?;
    match row {
        Some(row) => row.try_into(),
        None => Err(precondition_error(connection, owner_id, id, precondition).await?),
    }
}

/// Deletes a todo with its content, or purges the content of a deleted one.
///
/// # Errors
/// [`Error::TodoNotFound`] or [`Error::EtagMismatch`].
pub(super) async fn purge(
    connection: &mut PgConnection,
    target: Target,
) -> Result<DeletedTodo, Error> {
    let Target { owner_id, id, precondition, now } = target;
    loop {
        if let Some(purged) = try_purge(connection, target).await? {
            return Ok(purged);
        }
        let found = find(connection, owner_id, id, now).await?;
        let Some(Found::Todo(current) | Found::Deleted(current)) = found else {
            return Err(Error::TodoNotFound);
        };
        // Otherwise another call deleted or restored it between the two statements.
        if precondition.version().is_some_and(|version| version != current) {
            let current = Some(etag::encode(current));
            return Err(Error::precondition("todo", current, Error::TodoNotFound));
        }
    }
}

async fn try_purge(
    connection: &mut PgConnection,
    target: Target,
) -> Result<Option<DeletedTodo>, Error> {
    let row = sqlx::query_as!(
        DeletedTodoRow,
        r#"with clock as (
             update todo_clocks set version = greatest(version + 1, $4)
             where owner_id = $1 and (
                 exists (
                     select from todos
                     where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
                 )
                 or exists (
                     select from todo_trash
                     where owner_id = $1 and id = $2 and title is not null and version > $5
                         and ($3::bigint is null or version = $3)
                 )
             )
             returning version as tick
         ), deleted as (
             delete from todos using clock
             where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
             returning tick
         ), purged as (
             update todo_trash set
                 title = null, title_folded = null, description = null,
                 description_folded = null, state = null, version = tick
             from clock
             where owner_id = $1 and id = $2 and title is not null and version > $5
                 and ($3::bigint is null or version = $3)
             returning version
         ), added as (
             insert into todo_trash as trash (owner_id, id, version)
             select $1, $2, tick from deleted
             returning trash.version
         )
         select $2::uuid as "id!", null::text as title, null::text as description,
             null::smallint as state, version as "version!"
         from (select version from purged union all select version from added) as gone"#,
        target.owner_id.as_uuid(),
        target.id.as_uuid(),
        target.precondition.version(),
        target.now,
        content_cutoff(target.now),
    )
    .fetch_optional(connection)
    .await?;
    row.map(DeletedTodo::try_from).transpose()
}

/// Moves a todo back from the trash.
///
/// # Errors
/// [`Error::TodoNotDeleted`] or [`Error::TodoNotFound`].
pub(super) async fn undelete(
    connection: &mut PgConnection,
    owner_id: UserId,
    id: TodoId,
    now: i64,
) -> Result<Todo, Error> {
    loop {
        if let Some(todo) = try_undelete(connection, owner_id, id, now).await? {
            return Ok(todo);
        }
        match find(connection, owner_id, id, now).await? {
            Some(Found::Todo(_)) => return Err(Error::TodoNotDeleted),
            // Another call deleted it between the two statements.
            Some(Found::Deleted(_)) => {}
            None => return Err(Error::TodoNotFound),
        }
    }
}

async fn try_undelete(
    connection: &mut PgConnection,
    owner_id: UserId,
    id: TodoId,
    now: i64,
) -> Result<Option<Todo>, Error> {
    let row = sqlx::query_as!(
        TodoRow,
        "with clock as (
             update todo_clocks set version = greatest(version + 1, $3)
             where owner_id = $1 and exists (
                 select from todo_trash
                 where owner_id = $1 and id = $2 and title is not null and version > $4
             )
             returning version as tick
         ), restored as (
             delete from todo_trash using clock
             where owner_id = $1 and id = $2 and title is not null and version > $4
             returning title, title_folded, description, description_folded, state, tick
         )
         insert into todos as restored (
             owner_id, id, title, title_folded, description, description_folded, state, version
         )
         select $1, $2, title, title_folded, description, description_folded, state, tick
         from restored
         returning restored.id, restored.title, restored.description, restored.state,
             restored.version",
        owner_id.as_uuid(),
        id.as_uuid(),
        now,
        content_cutoff(now),
    )
    .fetch_optional(connection)
    .await?;
    row.map(Todo::try_from).transpose()
}

/// What an ID names.
enum Found {
    /// A todo with this version.
    Todo(i64),
    /// A deleted todo whose content is not purged, with the version of its deletion.
    Deleted(i64),
}

/// Returns `None` if the todo never existed, or is purged.
async fn find(
    connection: &mut PgConnection,
    owner_id: UserId,
    id: TodoId,
    now: i64,
) -> Result<Option<Found>, Error> {
    let row = sqlx::query!(
        r#"select version as "version!", false as "is_deleted!"
           from todos where owner_id = $1 and id = $2
           union all
           select version, true
           from todo_trash
           where owner_id = $1 and id = $2 and title is not null and version > $3"#,
        owner_id.as_uuid(),
        id.as_uuid(),
        content_cutoff(now),
    )
    .fetch_optional(connection)
    .await?;
    let found = |version, is_deleted| {
        if is_deleted { Found::Deleted(version) } else { Found::Todo(version) }
    };
    Ok(row.map(|row| found(row.version, row.is_deleted)))
}

/// Lists the deleted todos that are not purged, the newest deletion first.
pub(super) async fn list_deleted(
    connection: &mut PgConnection,
    owner_id: UserId,
    page: &PageRequest<DeletedTodoCursor>,
    now: i64,
) -> Result<DeletedTodoPage, Error> {
    let rows = sqlx::query!(
        r#"select id as "id!", title, description, state, version as "version!",
             candidates as "candidates!"
         from (
             select *,
                 count(*) over () as candidates,
                 row_number() over running as position,
                 sum(octet_length(title) + octet_length(description) + $5::int)
                     over running as bytes
             from (
                 select id, title, description, state, version
                 from todo_trash
                 where owner_id = $1 and version < $2 and version > $6 and title is not null
                 order by version desc
                 limit $3
             ) as page_rows
             window running as (order by version desc rows unbounded preceding)
         ) as measured
         where position = 1 or bytes <= $4
         order by position"#,
        owner_id.as_uuid(),
        page.after.map_or(i64::MAX, |cursor| cursor.version),
        // One more, to know whether there is one.
        page.size + 1,
        MAX_PAGE_BYTES,
        DELETED_TODO_OVERHEAD_BYTES,
        content_cutoff(now),
    )
    .fetch_all(connection)
    .await?;
    let size = usize::try_from(page.size).unwrap_or(usize::MAX);
    let candidates = rows.first().map_or(0, |row| row.candidates);
    let deleted_todos = rows.into_iter().take(size).map(|row| {
        let (id, title, description) = (row.id, row.title, row.description);
        let (state, version) = (row.state, row.version);
        DeletedTodoRow { id, title, description, state, version }.try_into()
    });
    let deleted_todos: Vec<DeletedTodo> = deleted_todos.collect::<Result<_, Error>>()?;
    let has_more = usize::try_from(candidates).is_ok_and(|all| all > deleted_todos.len());
    Ok(DeletedTodoPage { deleted_todos, has_more })
}
