//! Updating todos.

use sqlx::{
    FromRow, PgConnection, Postgres, Row,
    postgres::{PgArguments, PgRow},
    query::Query,
};
use uuid::Uuid;

use super::precondition_error;
use crate::{
    database::{
        arguments,
        batch::{BatchQuery, by_ordinal},
    },
    rpc::{error::Error, etag::Precondition},
    todo::{
        Description, Title, Todo, TodoPatch, TodoState,
        row::{TODO_COLUMN_COUNT, TodoRow, todo_columns},
    },
    types::id::{TodoId, UserId},
};

/// Updates the fields of a todo that are not null, if it has the required version.
///
/// The statement waits for the clock, and then compares the version with the newest one: another
/// write of the owner cannot come between. It does not wait if the version is wrong already when
/// it begins: it sees every version that the caller has from a response.
pub(in crate::todo) const UPDATE: &str = concat!(
    "with clock as (
         update todo_clocks set version = greatest(version + 1, $9)
         where owner_id = $1 and exists (
             select from todos
             where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
         )
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

/// Updates todos, each of its owner. Leaves out the owners whose clock another write holds.
pub(in crate::todo) const UPDATE_BATCH: &str = concat!(
    "with inputs as (
         select *, row_number() over (partition by input_owner_id order by ordinal) as number
         from unnest(
             $1::uuid[], $2::uuid[], $3::bigint[], $4::text[], $5::text[], $6::text[],
             $7::text[], $8::smallint[]
         ) with ordinality as inputs (
             input_owner_id, input_id, required, new_title, new_title_folded, new_description,
             new_description_folded, new_state, ordinal
         )
     ), counts as (
         select input_owner_id, count(*) as total from inputs group by input_owner_id
     ), free as materialized (
         select owner_id from todo_clocks where owner_id = any($1)
         for no key update skip locked
     ), clocks as (
         update todo_clocks as clock
         set version = greatest(clock.version + 1, $9) + total - 1
         from free join counts on input_owner_id = free.owner_id
         where clock.owner_id = free.owner_id
         returning input_owner_id, clock.version - total as before
     )
     update todos set
         title = coalesce(new_title, title),
         title_folded = coalesce(new_title_folded, title_folded),
         description = coalesce(new_description, description),
         description_folded = coalesce(new_description_folded, description_folded),
         state = coalesce(new_state, state),
         version = before + number
     from inputs join clocks using (input_owner_id)
     where owner_id = input_owner_id and id = input_id
         and (required is null or version = required)
     returning ",
    todo_columns!(),
    ", ordinal"
);

/// Updates todos of one owner, and waits for the clock.
pub(in crate::todo) const UPDATE_GROUP: &str = concat!(
    "with clock as (
         update todo_clocks set version = greatest(version + 1, $9) + cardinality($2::uuid[]) - 1
         where owner_id = $1
         returning version - cardinality($2::uuid[]) as before
     )
     update todos set
         title = coalesce(new_title, title),
         title_folded = coalesce(new_title_folded, title_folded),
         description = coalesce(new_description, description),
         description_folded = coalesce(new_description_folded, description_folded),
         state = coalesce(new_state, state),
         version = before + ordinal
     from clock, unnest(
         $2::uuid[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::smallint[]
     ) with ordinality as inputs (
         input_id, required, new_title, new_title_folded, new_description,
         new_description_folded, new_state, ordinal
     )
     where owner_id = $1 and id = input_id and (required is null or version = required)
     returning ",
    todo_columns!(),
    ", ordinal"
);

/// Updates todos, each of its owner.
#[derive(Debug)]
pub(super) struct UpdateTodos;

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

impl BatchQuery for UpdateTodos {
    type Input = Update;
    type Output = Todo;

    async fn run_one(connection: &mut PgConnection, input: &Update) -> Result<Todo, Error> {
        update(connection, input).await
    }

    async fn run_batch(
        connection: &mut PgConnection,
        updates: &[Update],
    ) -> Result<Vec<Option<Todo>>, Error> {
        let owner_ids: Vec<_> = updates.iter().map(|it| it.owner_id.as_uuid()).collect();
        let rows = Columns::new(updates).bind(sqlx::query(UPDATE_BATCH).bind(owner_ids));
        outputs(updates.len(), &rows.fetch_all(connection).await?)
    }

    fn writer(update: &Update) -> Option<UserId> {
        Some(update.owner_id)
    }

    fn target(update: &Update) -> Option<TodoId> {
        Some(update.id)
    }

    async fn run_group(
        connection: &mut PgConnection,
        updates: &[Update],
    ) -> Result<Vec<Option<Todo>>, Error> {
        let owner_id = updates.first().map(|update| update.owner_id.as_uuid());
        let rows = Columns::new(updates).bind(sqlx::query(UPDATE_GROUP).bind(owner_id));
        outputs(updates.len(), &rows.fetch_all(connection).await?)
    }
}

/// Arranges the updated todos in the order of the calls. Without one, the update runs alone, which
/// finds out why it changes nothing.
fn outputs(len: usize, rows: &[PgRow]) -> Result<Vec<Option<Todo>>, Error> {
    let todos: Result<Vec<_>, sqlx::Error> = rows
        .iter()
        .map(|row| Ok((row.try_get(TODO_COLUMN_COUNT)?, TodoRow::from_row(row)?.try_into())))
        .collect();
    Ok(by_ordinal(len, todos?).into_iter().map(Option::flatten).collect())
}

/// The parameters of several updates, in columns.
struct Columns {
    ids: Vec<Uuid>,
    required: Vec<Option<i64>>,
    titles: Vec<Option<String>>,
    titles_folded: Vec<Option<String>>,
    descriptions: Vec<Option<String>>,
    descriptions_folded: Vec<Option<String>>,
    states: Vec<Option<i16>>,
    now: i64,
}

impl Columns {
    fn new(updates: &[Update]) -> Self {
        fn column<T>(updates: &[Update], of: impl Fn(&Update) -> T) -> Vec<T> {
            updates.iter().map(of).collect()
        }
        let title = |of: fn(&Title) -> String| {
            column(updates, |update| update.patch.title.as_ref().map(of))
        };
        let description = |of: fn(&Description) -> String| {
            column(updates, |update| update.patch.description.as_ref().map(of))
        };
        Self {
            ids: column(updates, |update| update.id.as_uuid()),
            required: column(updates, |update| update.precondition.version()),
            titles: title(|title| title.as_str().to_owned()),
            titles_folded: title(Title::folded),
            descriptions: description(|description| description.as_str().to_owned()),
            descriptions_folded: description(Description::folded),
            states: column(updates, |update| update.patch.state.map(TodoState::number)),
            now: updates.iter().map(|update| update.now).max().unwrap_or_default(),
        }
    }

    /// Binds the parameters after the first.
    fn bind(self, query: Query<'_, Postgres, PgArguments>) -> Query<'_, Postgres, PgArguments> {
        query
            .bind(self.ids)
            .bind(self.required)
            .bind(self.titles)
            .bind(self.titles_folded)
            .bind(self.descriptions)
            .bind(self.descriptions_folded)
            .bind(self.states)
            .bind(self.now)
    }
}

/// Updates a todo.
///
/// # Errors
/// [`Error::TodoNotFound`] or [`Error::EtagMismatch`].
async fn update(connection: &mut PgConnection, update: &Update) -> Result<Todo, Error> {
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
