//! An owner whose todos several writers change, and what is known of the owner's history.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use fast_zero::proto::todo::v1::{DeletedTodo, Todo, todo_change::Change};
use fastrand::Rng;
use tokio::time::timeout;
use tonic::Status;
use tonic_types::StatusExt;

use super::{World, reader::Reading};
use crate::support::{Client, todos::todo_titled};

/// The todos for which the writers of an owner compete.
const TODOS: usize = 12;

/// How long a writer waits for a response. Some give up much earlier, in milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
const MAX_CANCELLED_AFTER: u64 = 5;

/// An owner.
pub(super) struct Owner {
    pub(super) client: Client,
    /// The todos for which the writers compete.
    todos: Mutex<Vec<String>>,
    history: Mutex<History>,
    /// What each reader holds.
    pub(super) readings: Vec<Mutex<Reading>>,
}

/// The writes that a server has responded to.
#[derive(Default)]
struct History {
    /// The latest state of each todo.
    latest: HashMap<String, Change>,
    versions: HashSet<i64>,
    max_version: i64,
}

/// A kind of write.
#[derive(Clone, Copy)]
enum Write {
    Create,
    Update,
    Delete,
    Undelete,
    Purge,
}

impl Owner {
    /// Creates the todos for which the writers compete.
    pub(super) async fn new(client: Client, readers: usize) -> Self {
        let mut todos = Vec::new();
        for number in 0..TODOS {
            todos.push(client.create_todo(&number.to_string()).await.id);
        }
        let readings = (0..readers).map(|_| Mutex::default()).collect();
        Self { client, todos: Mutex::new(todos), history: Mutex::default(), readings }
    }

    fn todos(&self) -> MutexGuard<'_, Vec<String>> {
        self.todos.lock().expect("not poisoned")
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("not poisoned")
    }

    /// Returns the latest acknowledged version.
    pub(super) fn max_version(&self) -> i64 {
        self.history().max_version
    }

    /// Returns the latest acknowledged state of each todo.
    pub(super) fn acknowledged(&self) -> Vec<Change> {
        self.history().latest.values().cloned().collect()
    }

    /// Records a write. Its version must be greater than those of the writes that were acknowledged
    /// before it began.
    fn acknowledge(&self, change: &Change, before: i64, world: &World) {
        world.counts.acknowledged.add(1);
        let version = version(change);
        let mut history = self.history();
        if version <= before {
            world.report(format!("the clock went back from {before} to {change:?}"));
        }
        if !history.versions.insert(version) {
            world.report(format!("another write has the version of {change:?}"));
        }
        history.max_version = history.max_version.max(version);
        let latest = history.latest.entry(id(change).to_owned()).or_insert_with(|| change.clone());
        if version > self::version(latest) {
            *latest = change.clone();
        }
        drop(history);
        for reading in &self.readings {
            reading.lock().expect("not poisoned").acknowledge(change, world);
        }
    }

    /// Makes random writes at random replicas.
    pub(super) async fn write(&self, world: &World, mut rng: Rng) {
        while !world.is_over() {
            let client = self.client.clone().with_channel(&world.channel(&mut rng));
            let is_cancelled = rng.u8(..8) == 0;
            let patience = if is_cancelled {
                Duration::from_millis(rng.u64(..MAX_CANCELLED_AFTER))
            } else {
                PATIENCE
            };
            let (write, id) = self.next_write(world, &mut rng);
            let before = self.max_version();
            match timeout(patience, perform(&client, write, &id, &mut rng)).await {
                Ok(Ok(change)) => {
                    self.acknowledge(&change, before, world);
                    self.replace(write, &id, &change, &mut rng);
                }
                Ok(Err(status)) => world.fail(&status).await,
                Err(_) => world.counts.cancelled.add(1),
            }
        }
    }

    fn next_write(&self, world: &World, rng: &mut Rng) -> (Write, String) {
        let todos = self.todos();
        let Some(id) = rng.choice(&*todos).cloned() else {
            return (Write::Create, String::new());
        };
        let write = match rng.u8(..60) {
            _ if !world.with_all_writes => Write::Update,
            _ if todos.len() < TODOS => Write::Create,
            0 => Write::Create,
            1 => Write::Purge,
            2..14 => Write::Delete,
            14..28 => Write::Undelete,
            _ => Write::Update,
        };
        (write, id)
    }

    /// Adds a todo that was created, and removes one that can change no more, or is one too many.
    fn replace(&self, write: Write, id: &str, change: &Change, rng: &mut Rng) {
        let mut todos = self.todos();
        match write {
            Write::Create => {
                todos.push(self::id(change).to_owned());
                if todos.len() > TODOS {
                    let removed = rng.usize(..TODOS);
                    todos.swap_remove(removed);
                }
            }
            Write::Purge => todos.retain(|known| known != id),
            Write::Update | Write::Delete | Write::Undelete => {}
        }
    }
}

/// Makes a write, and returns the state after it.
async fn perform(
    client: &Client,
    write: Write,
    id: &str,
    rng: &mut Rng,
) -> Result<Change, Box<Status>> {
    let title = rng.u32(..).to_string();
    let todo = |todo: Option<Todo>| Change::Todo(todo.expect("a todo"));
    let deleted = |deleted: Option<DeletedTodo>| Change::Deleted(deleted.expect("a deleted todo"));
    Ok(match write {
        Write::Create => {
            todo(client.try_create_todo(Some(todo_titled(&title))).await?.into_inner().todo)
        }
        Write::Update => {
            let new = Todo { id: id.to_owned(), ..todo_titled(&title) };
            todo(client.try_update_todo(Some(new), Some(&["title"])).await?.into_inner().todo)
        }
        Write::Delete => deleted(client.try_delete_todo(id, "").await?.into_inner().deleted),
        Write::Undelete => todo(client.try_undelete_todo(id).await?.into_inner().todo),
        Write::Purge => deleted(client.try_purge_todo(id, "").await?.into_inner().deleted),
    })
}

/// Returns the ID of the todo.
pub(super) fn id(change: &Change) -> &str {
    match change {
        Change::Todo(todo) => &todo.id,
        Change::Deleted(deleted) => &deleted.todo.as_ref().expect("a todo").id,
    }
}

/// Returns the version of a state.
pub(super) fn version(change: &Change) -> i64 {
    let etag = match change {
        Change::Todo(todo) => &todo.etag,
        Change::Deleted(deleted) => &deleted.todo.as_ref().expect("a todo").etag,
    };
    etag.parse().expect("an etag is a version")
}

/// Returns the reason of an error, unless it comes from a server that was killed.
pub(super) fn reason(status: &Status) -> Option<String> {
    status.get_error_details().error_info().map(|info| info.reason.clone())
}
