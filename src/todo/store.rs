//! The statements on todos, but lists ([`super::list`]). Each statement names the owner, so that
//! a caller cannot reach another user's todos.

use std::time::Duration;

use sqlx::{FromRow, PgConnection, Row};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{
    Description, NewTodo, OrderBy, Title, Todo, TodoCursor, TodoFilter, TodoPatch, TodoState,
    list::{self, TodoPage},
    list_batch::{BatchablePage, ListBatchablePages},
    row::{TODO_COLUMN_COUNT, TodoRow, todo_columns},
};
use crate::{
    database::{
        Database, arguments,
        batch::{BatchQuery, QueryBatcher, by_ordinal},
        errors::is_foreign_key_violation,
    },
    rpc::{
        error::Error,
        etag::{self, INITIAL_VERSION, Precondition},
        page_token::PageRequest,
    },
    types::{
        clock::Clock,
        id::{TodoId, UserId},
    },
};

/// Gets a todo.
pub(super) const GET: &str =
    concat!("select ", todo_columns!(), " from todos where owner_id = $1 and id = $2");

/// Gets todos, each of its owner.
pub(super) const GET_BATCH: &str = concat!(
    "select ",
    todo_columns!(),
    ", ordinal
     from unnest($1::uuid[], $2::uuid[]) with ordinality as inputs (owner_id, id, ordinal)
     join todos using (owner_id, id)"
);

/// Inserts a todo.
pub(super) const INSERT: &str = "insert into todos (
         owner_id, id, title, title_folded, description, description_folded,
         state, updated_at, version
     ) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)";

/// Updates the fields of a todo that are not null, if it has the required version.
pub(super) const UPDATE: &str = concat!(
    "update todos set
         title = coalesce($4, title),
         title_folded = coalesce($5, title_folded),
         description = coalesce($6, description),
         description_folded = coalesce($7, description_folded),
         state = coalesce($8, state),
         updated_at = $9,
         version = version + 1
     where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
     returning ",
    todo_columns!()
);

/// The statements on todos.
#[derive(Debug)]
pub(crate) struct TodoStore {
    database: Database,
    find: QueryBatcher<FindTodos>,
    list: QueryBatcher<ListBatchablePages>,
    insert: QueryBatcher<InsertTodos>,
}

impl TodoStore {
    /// Creates the store. `deadline` is the longest time for which a batched query waits.
    pub(crate) fn new(database: Database, batching: bool, deadline: Duration) -> Self {
        Self {
            find: QueryBatcher::new(database.clone(), batching, deadline),
            list: QueryBatcher::new(database.clone(), batching, deadline),
            insert: QueryBatcher::new(database.clone(), batching, deadline),
            database,
        }
    }

    /// Inserts a todo.
    ///
    /// # Errors
    /// [`Error::SessionRevoked`] if the owner was deleted concurrently.
    pub(super) async fn create(&self, owner_id: UserId, todo: NewTodo) -> Result<Todo, Error> {
        self.insert.run((owner_id, todo)).await
    }

    /// Gets a todo.
    pub(super) async fn get(&self, owner_id: UserId, id: TodoId) -> Result<Option<Todo>, Error> {
        self.find.run((owner_id, id)).await
    }

    /// Lists todos.
    pub(super) async fn list(
        &self,
        owner_id: UserId,
        filter: &TodoFilter,
        order_by: OrderBy,
        page: PageRequest<TodoCursor>,
    ) -> Result<TodoPage, Error> {
        match BatchablePage::new(owner_id, filter, order_by, page) {
            Ok(page) => self.list.run(page).await,
            Err(page) => {
                self.database
                    .run(async |connection| {
                        list::list(connection, owner_id, filter, order_by, &page).await
                    })
                    .await
            }
        }
    }

    /// Returns the clock of all times in the rows.
    pub(super) fn clock(&self) -> &Clock {
        self.database.clock()
    }

    /// Updates a todo.
    ///
    /// # Errors
    /// [`Error::TodoNotFound`] or [`Error::EtagMismatch`].
    pub(super) async fn update(
        &self,
        owner_id: UserId,
        id: TodoId,
        precondition: Precondition,
        patch: &TodoPatch,
    ) -> Result<Todo, Error> {
        let now = self.clock().now();
        self.database
            .run(async |connection| {
                let updated = update(connection, owner_id, id, precondition, patch, now).await?;
                match updated {
                    Some(todo) => Ok(todo),
                    None => Err(precondition_error(connection, owner_id, id, precondition).await?),
                }
            })
            .await
    }

    /// Deletes a todo.
    ///
    /// # Errors
    /// [`Error::TodoNotFound`] or [`Error::EtagMismatch`].
    pub(super) async fn delete(
        &self,
        owner_id: UserId,
        id: TodoId,
        precondition: Precondition,
    ) -> Result<(), Error> {
        self.database
            .run(async |connection| {
                if delete(connection, owner_id, id, precondition).await? {
                    return Ok(());
                }
                Err(precondition_error(connection, owner_id, id, precondition).await?)
            })
            .await
    }
}

async fn find(
    connection: &mut PgConnection,
    owner_id: UserId,
    id: TodoId,
) -> Result<Option<Todo>, Error> {
    let row: Option<TodoRow> = sqlx::query_as_with(GET, arguments(2))
        .bind(owner_id.as_uuid())
        .bind(id.as_uuid())
        .fetch_optional(connection)
        .await?;
    row.map(Todo::try_from).transpose()
}

/// Finds todos, each of its owner.
#[derive(Debug)]
struct FindTodos;

impl BatchQuery for FindTodos {
    type Input = (UserId, TodoId);
    type Output = Option<Todo>;

    async fn run_one(
        connection: &mut PgConnection,
        &(owner_id, id): &(UserId, TodoId),
    ) -> Result<Option<Todo>, Error> {
        find(connection, owner_id, id).await
    }

    async fn run_batch(
        connection: &mut PgConnection,
        inputs: &[(UserId, TodoId)],
    ) -> Result<Vec<Option<Option<Todo>>>, Error> {
        let (owner_ids, ids): (Vec<_>, Vec<_>) =
            inputs.iter().map(|(owner_id, id)| (owner_id.as_uuid(), id.as_uuid())).unzip();
        let rows = sqlx::query(GET_BATCH).bind(owner_ids).bind(ids).fetch_all(connection).await?;
        let todos: Result<Vec<_>, sqlx::Error> = rows
            .iter()
            .map(|row| {
                let todo = TodoRow::from_row(row)?;
                Ok((row.try_get(TODO_COLUMN_COUNT)?, Todo::try_from(todo)))
            })
            .collect();
        Ok(by_ordinal(inputs.len(), todos?))
    }
}

/// Inserts todos, each of its owner.
#[derive(Debug)]
struct InsertTodos;

impl BatchQuery for InsertTodos {
    type Input = (UserId, NewTodo);
    type Output = Todo;

    async fn run_one(
        connection: &mut PgConnection,
        (owner_id, todo): &(UserId, NewTodo),
    ) -> Result<Todo, Error> {
        insert(connection, *owner_id, todo).await?;
        Ok(todo.into())
    }

    async fn run_batch(
        connection: &mut PgConnection,
        inputs: &[(UserId, NewTodo)],
    ) -> Result<Vec<Option<Todo>>, Error> {
        let inserted = insert_all(connection, inputs).await?;
        let is_inserted = |todo: &NewTodo| inserted.contains(&todo.id.as_uuid());
        Ok(inputs.iter().map(|(_, todo)| is_inserted(todo).then(|| todo.into())).collect())
    }
}

async fn insert(
    connection: &mut PgConnection,
    owner_id: UserId,
    todo: &NewTodo,
) -> Result<(), Error> {
    sqlx::query_with(INSERT, arguments(9))
        .bind(owner_id.as_uuid())
        .bind(todo.id.as_uuid())
        .bind(todo.title.as_str())
        .bind(todo.title.folded())
        .bind(todo.description.as_str())
        .bind(todo.description.folded())
        .bind(todo.state.number())
        .bind(todo.id.create_time())
        .bind(INITIAL_VERSION)
        .execute(connection)
        .await
        .map(drop)
        .map_err(map_missing_owner)
}

/// Inserts the todos of the owners that exist and whose rows are not locked, and returns their
/// IDs. The others run alone: a lock means that the owner is being deleted, or changes.
async fn insert_all(
    connection: &mut PgConnection,
    todos: &[(UserId, NewTodo)],
) -> Result<Vec<Uuid>, Error> {
    fn column<'a, T>(todos: &'a [(UserId, NewTodo)], of: impl Fn(&'a NewTodo) -> T) -> Vec<T> {
        todos.iter().map(|(_, todo)| of(todo)).collect()
    }
    let owner_ids: Vec<_> = todos.iter().map(|(owner_id, _)| owner_id.as_uuid()).collect();
    let inserted = sqlx::query_scalar!(
        "with owners as materialized (
             select id from users where id = any($1::uuid[]) for key share skip locked
         )
         insert into todos (
             owner_id, id, title, title_folded, description, description_folded,
             state, updated_at, version
         )
         select new.*, $9::bigint
         from unnest(
             $1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[],
             $7::smallint[], $8::timestamptz[]
         ) as new (owner_id)
         join owners on owners.id = new.owner_id
         returning todos.id",
        &owner_ids,
        &column(todos, |todo| todo.id.as_uuid()),
        &column(todos, |todo| todo.title.as_str()) as &[&str],
        &column(todos, |todo| todo.title.folded()),
        &column(todos, |todo| todo.description.as_str()) as &[&str],
        &column(todos, |todo| todo.description.folded()),
        &column(todos, |todo| todo.state.number()),
        &column(todos, |todo| todo.id.create_time()),
        INITIAL_VERSION,
    );
    Ok(inserted.fetch_all(connection).await?)
}

fn map_missing_owner(error: sqlx::Error) -> Error {
    if is_foreign_key_violation(&error, "todos_owner_id_fkey") {
        Error::SessionRevoked
    } else {
        error.into()
    }
}

/// A new todo is stored as it is parsed.
impl From<&NewTodo> for Todo {
    fn from(todo: &NewTodo) -> Self {
        Self {
            id: todo.id,
            title: todo.title.as_str().to_owned(),
            description: todo.description.as_str().to_owned(),
            state: todo.state,
            updated_at: todo.id.create_time(),
            version: INITIAL_VERSION,
        }
    }
}

/// Returns `None` if the todo does not exist, or has another version than the required one.
async fn update(
    connection: &mut PgConnection,
    owner_id: UserId,
    id: TodoId,
    precondition: Precondition,
    patch: &TodoPatch,
    now: OffsetDateTime,
) -> Result<Option<Todo>, Error> {
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
        .fetch_optional(connection)
        .await?;
    row.map(Todo::try_from).transpose()
}

/// Returns `false` if the todo does not exist, or has another version than the required one.
async fn delete(
    connection: &mut PgConnection,
    owner_id: UserId,
    id: TodoId,
    precondition: Precondition,
) -> Result<bool, Error> {
    let deleted = sqlx::query!(
        "delete from todos
         where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)",
        owner_id.as_uuid(),
        id.as_uuid(),
        precondition.version(),
    )
    .execute(connection)
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// Returns why a conditional write changed nothing.
async fn precondition_error(
    connection: &mut PgConnection,
    owner_id: UserId,
    id: TodoId,
    precondition: Precondition,
) -> Result<Error, Error> {
    if precondition == Precondition::None {
        return Ok(Error::TodoNotFound);
    }
    let current = find(connection, owner_id, id).await?.map(|todo| etag::encode(todo.version));
    Ok(Error::precondition("todo", current, Error::TodoNotFound))
}
