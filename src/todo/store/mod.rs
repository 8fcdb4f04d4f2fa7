//! The statements on todos, but lists ([`super::list`]). Each statement names the owner, so that
//! a caller cannot reach another user's todos.
//!
//! Every write takes the clock of the owner first and moves it on, in the same statement. So the
//! second of two writes gets its version when the first is visible: a reader that sees a version
//! sees all lower ones of the owner, too.

mod create;
pub(super) mod sweep;
mod trash;
mod update;

use std::time::Duration;

use sqlx::{FromRow, PgConnection, Row};

use self::{
    create::{Insert, InsertTodos},
    trash::{DeletedTodoPage, Target},
    update::{Update, UpdateTodos},
};
use super::{
    DeletedTodo, NewTodo, Todo, TodoFilter, TodoPatch,
    changes::hub::WatchHub,
    list::{self, TodoPage},
    list_batch::{BatchablePage, ListBatchablePages},
    order::{DeletedTodoCursor, OrderBy, TodoCursor},
    row::{TODO_COLUMN_COUNT, TodoRow, todo_columns},
};
use crate::{
    database::{
        Database, arguments,
        batch::{BatchQuery, QueryBatcher, by_ordinal},
    },
    limits::owner_writes::OwnerWrites,
    rpc::{
        error::Error,
        etag::{self, Precondition},
        page_token::PageRequest,
    },
    types::{
        clock::Clock,
        id::{TodoId, UserId},
    },
};

pub(super) use self::{
    create::INSERT,
    update::{UPDATE, UPDATE_BATCH, UPDATE_GROUP},
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

/// The statements on todos.
#[derive(Debug)]
pub(crate) struct TodoStore {
    database: Database,
    writes: OwnerWrites,
    watches: WatchHub,
    find: QueryBatcher<FindTodos>,
    list: QueryBatcher<ListBatchablePages>,
    insert: QueryBatcher<InsertTodos>,
    update: QueryBatcher<UpdateTodos>,
}

impl TodoStore {
    /// Creates the store, whose writes wake `watches`. `deadline` is the longest time for which a
    /// batched query waits.
    pub(crate) fn new(
        database: Database,
        watches: WatchHub,
        batching: bool,
        deadline: Duration,
    ) -> Self {
        let writes = OwnerWrites::new(database.max_connections());
        Self {
            find: QueryBatcher::new(database.clone(), batching, deadline),
            list: QueryBatcher::new(database.clone(), batching, deadline),
            insert: QueryBatcher::with_writes(database.clone(), writes.clone(), batching, deadline),
            update: QueryBatcher::with_writes(database.clone(), writes.clone(), batching, deadline),
            database,
            writes,
            watches,
        }
    }

    /// Returns the clock of all times in the rows.
    pub(super) fn clock(&self) -> &Clock {
        self.database.clock()
    }

    /// Inserts a todo.
    ///
    /// # Errors
    /// [`Error::UserNotFound`] if the owner was deleted concurrently.
    pub(super) async fn create(&self, owner_id: UserId, todo: NewTodo) -> Result<Todo, Error> {
        let created =
            self.insert.run(Insert { owner_id, todo, now: self.clock().now_micros() }).await?;
        self.watches.wake(owner_id, created.version);
        Ok(created)
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

    /// Updates a todo.
    ///
    /// # Errors
    /// [`Error::TodoNotFound`] or [`Error::EtagMismatch`].
    pub(super) async fn update(
        &self,
        owner_id: UserId,
        id: TodoId,
        precondition: Precondition,
        patch: TodoPatch,
    ) -> Result<Todo, Error> {
        let update = Update { owner_id, id, precondition, patch, now: self.clock().now_micros() };
        let updated = self.update.run(update).await?;
        self.watches.wake(owner_id, updated.version);
        Ok(updated)
    }

    /// Deletes a todo. With `purge`, also its content, even if it is deleted already.
    ///
    /// # Errors
    /// [`Error::TodoNotFound`] or [`Error::EtagMismatch`].
    pub(super) async fn delete(
        &self,
        owner_id: UserId,
        id: TodoId,
        precondition: Precondition,
        purge: bool,
    ) -> Result<DeletedTodo, Error> {
        let target = Target { owner_id, id, precondition, now: self.clock().now_micros() };
        let write = async |connection: &mut PgConnection| {
            if purge {
                trash::purge(connection, target).await
            } else {
                trash::delete(connection, target).await
            }
        };
        let deleted = self.write(owner_id, write).await?;
        self.watches.wake(owner_id, deleted.version);
        Ok(deleted)
    }

    /// Restores a deleted todo.
    ///
    /// # Errors
    /// [`Error::TodoNotDeleted`] or [`Error::TodoNotFound`].
    pub(super) async fn undelete(&self, owner_id: UserId, id: TodoId) -> Result<Todo, Error> {
        let now = self.clock().now_micros();
        let write = async |connection: &mut PgConnection| {
            trash::undelete(connection, owner_id, id, now).await
        };
        let restored = self.write(owner_id, write).await?;
        self.watches.wake(owner_id, restored.version);
        Ok(restored)
    }

    /// Lists the deleted todos that are not purged, the newest deletion first.
    pub(super) async fn list_deleted(
        &self,
        owner_id: UserId,
        page: PageRequest<DeletedTodoCursor>,
    ) -> Result<DeletedTodoPage, Error> {
        let now = self.clock().now_micros();
        self.database
            .run(async |connection| trash::list_deleted(connection, owner_id, &page, now).await)
            .await
    }

    /// Runs a write to the todos of an owner, as soon as few enough others are in progress.
    async fn write<T>(
        &self,
        owner_id: UserId,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let permit = self.writes.acquire(owner_id).await;
        self.database.run_guarded(permit, work).await
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
