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

/// By index: a lookup by name costs a list of ten todos more than a microsecond.
impl<'r> FromRow<'r, PgRow> for TodoRow {
    fn from_row(row: &'r PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get(0)?,
            title: row.try_get(1)?,
            description: row.try_get(2)?,
            state: row.try_get(3)?,
            updated_at: row.try_get(4)?,
            version: row.try_get(5)?,
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
