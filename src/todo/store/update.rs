//! Updating todos.

use sqlx::PgConnection;

use super::precondition_error;
use crate::{
    database::arguments,
    rpc::{error::Error, etag::Precondition},
    todo::{
        Description, Title, Todo, TodoPatch, TodoState,
        row::{TodoRow, todo_columns},
    },
    types::id::{TodoId, UserId},
};

/// Updates the fields of a todo that are not null, if it has the required version.
///
/// The statement waits for the clock, and then compares the version with the newest one: another
/// write of the owner cannot come between.
pub(in crate::todo) const UPDATE: &str = concat!(
    "with clock as (
         update todo_clocks set version = greatest(version + 1, $9)
         where owner_id = $1 and exists (select from todos where owner_id = $1 and id = $2)
         returning version as tick
     )
     update todos set
         title = coalesce($4, title),
         title_folded = coalesce($5, title_folded),
         description = coalesce($6, description),
         description_folded = coalesce($7, description_folded),
         state = coalesce($8, state),
         version = tick
     from clock
     where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
     returning ",
    todo_columns!()
);

/// An update of a todo.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) owner_id: UserId,
    pub(super) id: TodoId,
    pub(super) precondition: Precondition,
    pub(super) patch: TodoPatch,
    /// The current time, in microseconds since 1970.
    pub(super) now: i64,
}

/// Updates a todo.
///
/// # Errors
/// [`Error::TodoNotFound`] or [`Error::EtagMismatch`].
pub(super) async fn update(connection: &mut PgConnection, update: &Update) -> Result<Todo, Error> {
    let &Update { owner_id, id, precondition, ref patch, now } = update;
    let (title, description) = (patch.title.as_ref(), patch.description.as_ref());
    let row: Option<TodoRow> = sqlx::query_as_with(UPDATE, arguments(9))
        .bind(owner_id.as_uuid())
        .bind(id.as_uuid())
        .bind(precondition.version())
        .bind(title.map(Title::as_str))
        .bind(title.map(Title::folded))
        .bind(description.map(Description::as_str))
        .bind(description.map(Description::folded))
        .bind(patch.state.map(TodoState::number))
        .bind(now)
        .fetch_optional(&mut *connection)
        .await?;
    match row {
        Some(row) => row.try_into(),
        None => Err(precondition_error(connection, owner_id, id, precondition).await?),
    }
}
