//! Creating todos, one or several in a statement.

use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::{
    database::{arguments, batch::BatchQuery, errors::is_foreign_key_violation},
    rpc::error::Error,
    todo::{NewTodo, Todo},
    types::id::UserId,
};

/// Inserts a todo. The first one of an owner creates the clock.
pub(in crate::todo) const INSERT: &str = "with clock as (
         insert into todo_clocks as clock (owner_id, version) values ($1, $8)
         on conflict (owner_id) do update
             set version = greatest(clock.version + 1, excluded.version)
         returning version as tick
     )
     insert into todos as created (
         owner_id, id, title, title_folded, description, description_folded, state, version
     )
     select $1, $2, $3, $4, $5, $6, $7, tick from clock
     returning version";

/// Inserts todos, each of its owner.
#[derive(Debug)]
pub(super) struct InsertTodos;

/// A todo to insert.
#[derive(Debug)]
pub(super) struct Insert {
    pub(super) owner_id: UserId,
    pub(super) todo: NewTodo,
    /// The current time, in microseconds since 1970.
    pub(super) now: i64,
}

impl Insert {
    /// Returns the todo as it is stored: as it is parsed, with its version.
    fn stored(&self, version: i64) -> Todo {
        Todo {
            id: self.todo.id,
            title: self.todo.title.as_str().to_owned(),
            description: self.todo.description.as_str().to_owned(),
            state: self.todo.state,
            version,
        }
    }
}

impl BatchQuery for InsertTodos {
    type Input = Insert;
    type Output = Todo;

    async fn run_one(connection: &mut PgConnection, insert: &Insert) -> Result<Todo, Error> {
        let todo = &insert.todo;
        let row = sqlx::query_with(INSERT, arguments(8))
            .bind(insert.owner_id.as_uuid())
            .bind(todo.id.as_uuid())
            .bind(todo.title.as_str())
            .bind(todo.title.folded())
            .bind(todo.description.as_str())
            .bind(todo.description.folded())
            .bind(todo.state.number())
            .bind(insert.now)
            .fetch_one(connection)
            .await
            .map_err(map_missing_owner)?;
        Ok(insert.stored(row.try_get(0)?))
    }

    /// Inserts the todos of the owners that have a clock, which no other write holds. The others
    /// create the clock, or wait for it.
    async fn run_batch(
        connection: &mut PgConnection,
        inserts: &[Insert],
    ) -> Result<Vec<Option<Todo>>, Error> {
        let owner_ids: Vec<_> = inserts.iter().map(|it| it.owner_id.as_uuid()).collect();
        let rows = sqlx::query!(
            r#"with inputs as (
                 select *, row_number() over (partition by owner_id order by ordinal) as number
                 from unnest(
                     $1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[],
                     $7::smallint[]
                 ) with ordinality as inputs (
                     owner_id, id, title, title_folded, description, description_folded, state,
                     ordinal
                 )
             ), counts as (
                 select owner_id, count(*) as total from inputs group by owner_id
             ), free as materialized (
                 select owner_id from todo_clocks where owner_id = any($1)
                 for no key update skip locked
             ), clocks as (
                 update todo_clocks as clock
                 set version = greatest(clock.version + 1, $8) + total - 1
                 from free join counts using (owner_id)
                 where clock.owner_id = free.owner_id
                 returning clock.owner_id, clock.version - total as before
             )
             insert into todos as created (
                 owner_id, id, title, title_folded, description, description_folded, state, version
             )
             select owner_id, id, title, title_folded, description, description_folded, state,
                 before + number
             from inputs join clocks using (owner_id)
             returning created.id, created.version"#,
            &owner_ids,
            &column(inserts, |todo| todo.id.as_uuid()),
            &column(inserts, |todo| todo.title.as_str()) as &[&str],
            &column(inserts, |todo| todo.title.folded()),
            &column(inserts, |todo| todo.description.as_str()) as &[&str],
            &column(inserts, |todo| todo.description.folded()),
            &column(inserts, |todo| todo.state.number()),
            latest(inserts),
        );
        let rows = rows.fetch_all(connection).await?;
        let versions: Vec<_> = rows.into_iter().map(|row| (row.id, row.version)).collect();
        Ok(stored(inserts, &versions))
    }

    fn writer(insert: &Insert) -> Option<UserId> {
        Some(insert.owner_id)
    }

    async fn run_group(
        connection: &mut PgConnection,
        inserts: &[Insert],
    ) -> Result<Vec<Option<Todo>>, Error> {
        let Some(first) = inserts.first() else {
            return Ok(Vec::new());
        };
        insert_group(connection, first.owner_id, inserts).await
    }
}

/// Inserts the todos of one owner, and waits for the clock.
async fn insert_group(
    connection: &mut PgConnection,
    owner_id: UserId,
    inserts: &[Insert],
) -> Result<Vec<Option<Todo>>, Error> {
    let rows = sqlx::query!(
        r#"with clock as (
             insert into todo_clocks as clock (owner_id, version)
             values ($1, $8::bigint + cardinality($2::uuid[]) - 1)
             on conflict (owner_id) do update set version =
                 greatest(clock.version + 1, $8) + cardinality($2) - 1
             returning version - cardinality($2) as before
         )
         insert into todos as created (
             owner_id, id, title, title_folded, description, description_folded, state, version
         )
         select $1, id, title, title_folded, description, description_folded, state,
             before + number
         from clock, unnest(
             $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::smallint[]
         ) with ordinality as inputs (
             id, title, title_folded, description, description_folded, state, number
         )
         returning created.id, created.version"#,
        owner_id.as_uuid(),
        &column(inserts, |todo| todo.id.as_uuid()),
        &column(inserts, |todo| todo.title.as_str()) as &[&str],
        &column(inserts, |todo| todo.title.folded()),
        &column(inserts, |todo| todo.description.as_str()) as &[&str],
        &column(inserts, |todo| todo.description.folded()),
        &column(inserts, |todo| todo.state.number()),
        latest(inserts),
    );
    let rows = rows.fetch_all(connection).await.map_err(map_missing_owner)?;
    let versions: Vec<_> = rows.into_iter().map(|row| (row.id, row.version)).collect();
    Ok(stored(inserts, &versions))
}

/// Returns the inserted todos in the order of the queries.
fn stored(inserts: &[Insert], versions: &[(Uuid, i64)]) -> Vec<Option<Todo>> {
    let stored = |insert: &Insert| {
        let inserted = versions.iter().find(|(id, _)| *id == insert.todo.id.as_uuid());
        inserted.map(|(_, version)| insert.stored(*version))
    };
    inserts.iter().map(stored).collect()
}

/// Returns the latest time of all.
fn latest(inserts: &[Insert]) -> i64 {
    inserts.iter().map(|insert| insert.now).max().unwrap_or_default()
}

fn column<'a, T>(inserts: &'a [Insert], of: impl Fn(&'a NewTodo) -> T) -> Vec<T> {
    inserts.iter().map(|insert| of(&insert.todo)).collect()
}

fn map_missing_owner(error: sqlx::Error) -> Error {
    if is_foreign_key_violation(&error, "todo_clocks_owner_id_fkey") {
        Error::UserNotFound
    } else {
        error.into()
    }
}
