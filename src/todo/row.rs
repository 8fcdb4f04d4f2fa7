//! The columns of a todo, and the row that has them.

use sqlx::{FromRow, Row, postgres::PgRow};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Todo, TodoState};
use crate::{rpc::error::Error, types::id::TodoId};

/// The columns of a todo, in the order in which [`TodoRow`] reads them.
macro_rules! todo_columns {
    () => {
        "id, title, description, state, updated_at, version"
    };
}
pub(super) use todo_columns;

/// The number of columns of a todo: the index of the first further column of a row.
pub(super) const TODO_COLUMN_COUNT: usize = 6;

/// A row with the columns of [`todo_columns`].
pub(super) struct TodoRow {
    id: Uuid,
    title: String,
    description: String,
    state: i16,
    updated_at: OffsetDateTime,
    version: i64,
}

/// By index and without a check of the type, as the macros of sqlx read rows: lookups by name and
/// checks are a twentieth of what a list of ten todos costs the service. The statements take all
/// columns from the table, so that the migrations fix their types.
impl<'r> FromRow<'r, PgRow> for TodoRow {
    fn from_row(row: &'r PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get_unchecked(0)?,
            title: row.try_get_unchecked(1)?,
            description: row.try_get_unchecked(2)?,
            state: row.try_get_unchecked(3)?,
            updated_at: row.try_get_unchecked(4)?,
            version: row.try_get_unchecked(5)?,
        })
    }
}

impl TryFrom<TodoRow> for Todo {
    type Error = Error;

    fn try_from(row: TodoRow) -> Result<Self, Error> {
        let state = TodoState::parse(row.state.into())
            .map_err(|_| Error::internal(format!("a todo has the unknown state {}", row.state)))?;
        Ok(Self {
            id: TodoId::from_uuid(row.id),
            title: row.title,
            description: row.description,
            state,
            updated_at: row.updated_at,
            version: row.version,
        })
    }
}
