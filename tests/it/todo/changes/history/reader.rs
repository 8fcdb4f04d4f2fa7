//! A reader of an owner's changes, which checks what it holds whenever it has caught up.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use fast_zero::proto::todo::v1::{
    DeletedTodo, SyncTodosRequest, WatchTodosRequest, WatchTodosResponse, todo_change::Change,
};
use fastrand::Rng;
use tokio::time::{Instant, timeout_at};

use super::{
    World,
    owner::{Owner, id, version},
};
use crate::support::{
    Client,
    changes::{Copy, to_message},
    todos::titles,
};

/// How long a watch lasts, in milliseconds, unless a kill ends it.
const MAX_WATCH_MILLIS: u64 = 2_000;

/// The number of calls of `SyncTodos` between two watches.
const MAX_SYNCS: u8 = 10;

/// Where a cursor has its version (`src/todo/changes/cursor.rs`), which clients cannot know.
const CURSOR_VERSION_AT: usize = 13;

/// What a reader holds.
#[derive(Default)]
pub(super) struct Reading {
    pub(super) copy: Copy,
    /// The latest state of each todo.
    held: HashMap<String, Change>,
    /// The version of the cursor of the last page, if it had caught up.
    caught_up_at: Option<i64>,
    /// The version of the last cursor.
    cursor: i64,
    /// Acknowledged writes that the reader need not hold yet.
    pending: Vec<Change>,
}

impl Reading {
    /// Notes a write. If the reader has caught up beyond it, the reader must hold it.
    pub(super) fn acknowledge(&mut self, change: &Change, world: &World) {
        if self.caught_up_at.is_some_and(|cursor| version(change) <= cursor) {
            self.check(change, world);
        } else {
            self.pending.push(change.clone());
        }
    }

    /// Checks that the reader holds this state or a later one.
    pub(super) fn check(&self, change: &Change, world: &World) {
        world.counts.compared.add(1);
        let held = self.held.get(id(change));
        let held_version = held.map(version).unwrap_or_default();
        if held_version < version(change) || held_version == version(change) && held != Some(change)
        {
            world.report(format!("{change:?} is acknowledged, but the copy holds {held:?}"));
        }
    }

    /// Applies a page. Without `before`, the page may have been read at any time; with it, after
    /// the write with that version was acknowledged.
    fn apply(&mut self, page: WatchTodosResponse, before: Option<i64>, world: &World) {
        world.counts.pages.add(1);
        for change in page.changes.iter().filter_map(|change| change.change.as_ref()) {
            world.counts.changes.add(1);
            let held = self.held.get(id(change));
            if held.is_some_and(|held| version(held) > version(change)) {
                world.report(format!("{change:?} is older than {held:?}"));
            }
            self.held.insert(id(change).to_owned(), change.clone());
        }
        let (caught_up, full) = (page.caught_up, page.full);
        self.copy.apply(page);
        let cursor = cursor_version(&self.copy.cursor);
        self.caught_up_at = caught_up.then_some(cursor);
        if !caught_up {
            return;
        }
        world.counts.caught_up.add(1);
        if full {
            world.counts.full_syncs.add(1);
        }
        if cursor < self.cursor {
            world.report(format!("the cursor went back from {} to {cursor}", self.cursor));
        }
        self.cursor = cursor;
        if let Some(before) = before.filter(|before| *before > cursor) {
            world.report(format!("{before} is acknowledged, but the cursor is at {cursor}"));
        }
        for change in std::mem::take(&mut self.pending) {
            if version(&change) <= cursor {
                self.check(&change, world);
            } else {
                self.pending.push(change);
            }
        }
    }
}

/// Returns the version of a cursor.
fn cursor_version(cursor: &str) -> i64 {
    let bytes = URL_SAFE_NO_PAD.decode(cursor).expect("a cursor");
    let version = bytes[CURSOR_VERSION_AT..].first_chunk().expect("a version");
    i64::from_be_bytes(*version)
}

/// One of the readers of an owner.
pub(super) struct Reader<'a> {
    pub(super) owner: &'a Owner,
    pub(super) reading: &'a Mutex<Reading>,
    pub(super) world: &'a World,
}

impl Reader<'_> {
    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().expect("not poisoned")
    }

    /// Follows the changes by pages and by watches, from either replica.
    pub(super) async fn read(&self, mut rng: Rng) {
        while !self.world.is_over() {
            if rng.u8(..20) == 0 {
                self.reading().copy.cursor.clear();
            }
            if rng.bool() {
                self.sync(&mut rng).await;
            } else {
                self.watch(&mut rng).await;
            }
        }
    }

    fn client(&self, rng: &mut Rng) -> Client {
        self.owner.client.clone().with_channel(&self.world.channel(rng))
    }

    async fn sync(&self, rng: &mut Rng) {
        for _ in 0..rng.u8(1..MAX_SYNCS) {
            self.world.counts.syncs.add(1);
            let before = self.owner.max_version();
            let cursor = self.reading().copy.cursor.clone();
            // Larger pages end full syncs.
            let page_size = if cursor.is_empty() { 1_000 } else { rng.i32(1..200) };
            let request = SyncTodosRequest { cursor, page_size };
            match self.client(rng).try_sync_todos(request).await {
                Ok(page) => {
                    let page = to_message(page.into_inner());
                    self.reading().apply(page, Some(before), self.world);
                }
                Err(status) => return self.world.fail(&status).await,
            }
        }
    }

    async fn watch(&self, rng: &mut Rng) {
        self.world.counts.watches.add(1);
        let cursor = self.reading().copy.cursor.clone();
        let request = WatchTodosRequest { cursor, from_now: false };
        let until = Instant::now() + Duration::from_millis(rng.u64(..MAX_WATCH_MILLIS));
        let mut stream = match self.client(rng).try_watch_todos(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => return self.world.fail(&status).await,
        };
        while let Ok(message) = timeout_at(until, stream.message()).await {
            match message {
                // The server may have read the message before any write that is known by now.
                Ok(Some(message)) => self.reading().apply(message, None, self.world),
                Ok(None) => self.world.report("a watch ended without an error".to_owned()),
                Err(status) => {
                    self.world.counts.broken_watches.add(1);
                    return self.world.fail(&status).await;
                }
            }
        }
    }

    /// Checks, without writers, that the reader holds all acknowledged writes, and what the lists
    /// contain.
    pub(super) async fn check_at_rest(&self, client: &Client) {
        let mut before = self.owner.max_version();
        loop {
            let cursor = self.reading().copy.cursor.clone();
            let page = client.sync_todos(SyncTodosRequest { cursor, page_size: 1_000 }).await;
            let (page, is_last) = (to_message(page.clone()), page.caught_up);
            self.reading().apply(page, Some(before), self.world);
            before = self.owner.max_version();
            if is_last {
                break;
            }
        }
        let todos = client.list_all_todos(<_>::default()).await;
        let mut deleted = client.list_deleted_todos(1_000).await;
        deleted.reverse();
        let reading = self.reading();
        for change in self.owner.acknowledged() {
            reading.check(&change, self.world);
        }
        let copied: Vec<_> = reading.copy.todos.values().cloned().collect();
        if copied != todos {
            let (copied, todos) = (titles(&copied), titles(&todos));
            self.world.report(format!("at rest, {copied:?} differs from {todos:?}"));
        }
        let is_listed = |it: &&DeletedTodo| it.purge_time != it.delete_time;
        let mut copied: Vec<_> = reading.copy.deleted.values().filter(is_listed).cloned().collect();
        copied.sort_by_key(|it| version(&Change::Deleted(it.clone())));
        if copied != deleted {
            self.world.report(format!("at rest, {copied:?} differs from {deleted:?}"));
        }
    }
}
