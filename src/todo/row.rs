//! The columns of a todo, and the row that has them.

use sqlx::{FromRow, Row, postgres::PgRow};
use uuid::Uuid;

use super::{DeletedTodo, Todo, TodoContent, TodoState};
use crate::{rpc::error::Error, types::id::TodoId};

/// The columns of a todo, in the order in which [`TodoRow`] reads them.
macro_rules! todo_columns {
    () => {
        "id, title, description, state, version"
    };
}
pub(super) use todo_columns;

/// The number of columns of a todo: the index of the first further column of a row.
pub(super) const TODO_COLUMN_COUNT: usize = 5;

/// A row with the columns of [`todo_columns`].
pub(super) struct TodoRow {
    pub(super) id: Uuid,
    pub(super) title: String,
    pub(super) description: String,
    pub(super) state: i16,
    pub(super) version: i64,
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
            version: row.try_get_unchecked(4)?,
        })
    }
}

impl TryFrom<TodoRow> for Todo {
    type Error = Error;

    fn try_from(row: TodoRow) -> Result<Self, Error> {
        Ok(Self {
            id: TodoId::from_uuid(row.id),
            title: row.title,
            description: row.description,
            state: parse_state(row.state)?,
            version: row.version,
        })
    }
}

/// A row of `todo_trash`.
pub(super) struct DeletedTodoRow {
    pub(super) id: Uuid,
    pub(super) title: Option<String>,
    pub(super) description: Option<String>,
    pub(super) state: Option<i16>,
    pub(super) version: i64,
}

impl TryFrom<DeletedTodoRow> for DeletedTodo {
    type Error = Error;

    fn try_from(row: DeletedTodoRow) -> Result<Self, Error> {
        let content = match (row.title, row.description, row.state) {
            (Some(title), Some(description), Some(state)) => {
                Some(TodoContent { title, description, state: parse_state(state)? })
            }
            _ => None,
        };
        Ok(Self { id: TodoId::from_uuid(row.id), content, version: row.version })
    }
}

fn parse_state(number: i16) -> Result<TodoState, Error> {
    TodoState::parse(number.into())
        .map_err(|_| Error::internal(format!("a todo has the unknown state {number}")))
}
