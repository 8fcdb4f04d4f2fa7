//! Following changes: `SyncTodos` and `WatchTodos`.

mod cursors;
mod ends;
mod history;
mod many;
mod slow;
mod sync;
mod watch;
