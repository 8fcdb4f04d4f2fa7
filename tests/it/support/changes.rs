//! `SyncTodos` and `WatchTodos`, and a client's copy of the todos that they keep synchronized.

use std::collections::BTreeMap;

use fast_zero::proto::todo::v1::{
    DeletedTodo, SyncTodosRequest, SyncTodosResponse, Todo, TodoChange, WatchTodosRequest,
    WatchTodosResponse, todo_change::Change,
};
use tonic::Streaming;

use super::{Client, RpcResult, wait::with_timeout};

/// More pages than a sync of any test has.
const MAX_PAGES: usize = 5_000;

/// A client's copy of its todos.
#[derive(Clone, Debug, Default)]
pub struct Copy {
    pub todos: BTreeMap<String, Todo>,
    /// The deletions, by the ID of the todo.
    pub deleted: BTreeMap<String, DeletedTodo>,
    pub cursor: String,
    /// The todos that the current full sync has contained. `None` outside of a full sync.
    seen: Option<Vec<String>>,
}

impl Copy {
    /// Applies a page, as `docs/api.md` describes.
    pub fn apply(&mut self, page: WatchTodosResponse) {
        if page.full && (self.seen.is_none() || self.cursor.is_empty()) {
            self.seen = Some(Vec::new());
        }
        for change in page.changes {
            let id = id(&change);
            if let Some(seen) = &mut self.seen {
                seen.push(id.clone());
            }
            match change.change.expect("a change") {
                Change::Todo(todo) => {
                    self.deleted.remove(&id);
                    self.todos.insert(id, todo);
                }
                Change::Deleted(deleted) => {
                    self.todos.remove(&id);
                    self.deleted.insert(id, deleted);
                }
            }
        }
        if page.caught_up
            && let Some(seen) = self.seen.take()
        {
            self.todos.retain(|id, _| seen.contains(id));
            self.deleted.retain(|id, _| seen.contains(id));
        }
        self.cursor = page.cursor;
    }

    /// Calls `SyncTodos` until the copy has caught up.
    pub async fn sync(&mut self, client: &Client, page_size: i32) {
        for _ in 0..MAX_PAGES {
            let request = SyncTodosRequest { cursor: self.cursor.clone(), page_size };
            let page = client.sync_todos(request).await;
            let caught_up = page.caught_up;
            self.apply(to_message(page));
            if caught_up {
                return;
            }
        }
        panic!("the sync does not end");
    }

    pub fn titles(&self) -> Vec<&str> {
        let mut titles: Vec<_> = self.todos.values().map(|todo| &*todo.title).collect();
        titles.sort_unstable();
        titles
    }
}

/// Returns a page of `SyncTodos` as a message of `WatchTodos`, which has the same fields.
pub fn to_message(page: SyncTodosResponse) -> WatchTodosResponse {
    let SyncTodosResponse { changes, cursor, caught_up, full } = page;
    WatchTodosResponse { changes, cursor, caught_up, full }
}

/// Returns the ID of the changed todo.
pub fn id(change: &TodoChange) -> String {
    match change.change.as_ref().expect("a change") {
        Change::Todo(todo) => todo.id.clone(),
        Change::Deleted(deleted) => deleted.todo.as_ref().expect("a todo").id.clone(),
    }
}

/// Returns the titles of changed todos, with a minus before those of deleted ones.
pub fn described(changes: &[TodoChange]) -> Vec<String> {
    let described = |change: &TodoChange| match change.change.as_ref().expect("a change") {
        Change::Todo(todo) => todo.title.clone(),
        Change::Deleted(deleted) => {
            format!("-{}", deleted.todo.as_ref().expect("a todo").title)
        }
    };
    changes.iter().map(described).collect()
}

impl Client {
    pub async fn try_sync_todos(&self, request: SyncTodosRequest) -> RpcResult<SyncTodosResponse> {
        self.todos().sync_todos(request).await
    }

    /// Returns one page.
    pub async fn sync_todos(&self, request: SyncTodosRequest) -> SyncTodosResponse {
        self.try_sync_todos(request).await.expect("synced").into_inner()
    }

    /// Returns a cursor at the present.
    pub async fn cursor(&self) -> String {
        let mut copy = Copy::default();
        copy.sync(self, 1_000).await;
        copy.cursor
    }

    pub async fn try_watch_todos(
        &self,
        request: WatchTodosRequest,
    ) -> RpcResult<Streaming<WatchTodosResponse>> {
        self.todos().watch_todos(request).await
    }

    pub async fn watch_todos(&self, request: WatchTodosRequest) -> Streaming<WatchTodosResponse> {
        self.try_watch_todos(request).await.expect("opened").into_inner()
    }

    /// Watches from the present on, and takes the first message.
    pub async fn watch_from_now(&self) -> Streaming<WatchTodosResponse> {
        let request = WatchTodosRequest { from_now: true, ..<_>::default() };
        let mut stream = self.watch_todos(request).await;
        let first = next_message(&mut stream).await;
        assert!(first.changes.is_empty() && first.caught_up && !first.full, "{first:?}");
        stream
    }
}

/// Waits for the next message.
pub async fn next_message(stream: &mut Streaming<WatchTodosResponse>) -> WatchTodosResponse {
    let message = with_timeout("a message", stream.message()).await;
    message.expect("no error").expect("a message")
}
