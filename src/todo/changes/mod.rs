//! Following the changes of an owner's todos, for `SyncTodos` and `WatchTodos`.
//!
//! A change is a state: the todo as it is now, or that it is deleted. Both tables have the version
//! of the last change, so the changes after a version are the rows with a greater one ([`store`]).
//! A cursor is a version and what it was valid for ([`cursor`]). A watch waits for the clock of its
//! owner to pass its cursor ([`hub`]), and then reads the next page ([`watch`]).

pub(crate) mod cursor;
pub(crate) mod hub;
pub(crate) mod service;
mod store;
mod watch;

use uuid::Uuid;

use self::cursor::ChangeCursor;
use super::{DeletedTodo, Todo};
use crate::rpc::{error::Error, expired_cursor::ExpiredCursor};

/// The current state of a todo that has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Change {
    Todo(Todo),
    Deleted(DeletedTodo),
}

impl Change {
    /// Returns the version, by the clock of the owner.
    fn version(&self) -> i64 {
        match self {
            Self::Todo(todo) => todo.version,
            Self::Deleted(deleted) => deleted.version,
        }
    }
}

/// The next changes of an owner.
#[derive(Debug)]
struct ChangePage {
    changes: Vec<Change>,
    /// The cursor after the changes.
    cursor: ChangeCursor,
    /// Whether the page contains all changes so far.
    caught_up: bool,
    /// Whether the page is part of a full sync.
    full: bool,
}

/// Where a page starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StartAt {
    /// Before all changes: a full sync.
    Beginning,
    /// After all changes so far.
    Present,
    /// After a cursor.
    Cursor(ChangeCursor),
}

impl StartAt {
    /// Returns the version after which the page starts.
    fn version(self) -> i64 {
        match self {
            Self::Beginning => 0,
            Self::Present => i64::MAX,
            Self::Cursor(cursor) => cursor.version,
        }
    }

    /// Checks that the changes after this position are those that the client misses. `present` is
    /// what the database has.
    fn check(self, present: Present) -> Result<(), Error> {
        let Self::Cursor(cursor) = self else {
            return Ok(());
        };
        if cursor.incarnation != present.incarnation {
            return Err(Error::CursorExpired(ExpiredCursor::Restored));
        }
        if cursor.version > present.version {
            return Err(Error::CursorExpired(ExpiredCursor::Future));
        }
        Ok(())
    }

    /// Returns the page with these changes, which were read after `now`. `has_more` says whether
    /// more follow.
    fn page(self, present: Present, changes: Vec<Change>, has_more: bool, now: i64) -> ChangePage {
        let last = changes.last().map(Change::version).filter(|_| has_more);
        let (full, started_at) = match self {
            Self::Beginning => (true, now),
            Self::Present => (false, now),
            Self::Cursor(cursor) => (cursor.full, cursor.made_at),
        };
        let cursor = match last {
            // Deletions after the cursor stay known for as long as they would after the previous
            // one, or since they happened, if that is later.
            Some(version) => ChangeCursor {
                version,
                incarnation: present.incarnation,
                made_at: started_at.max(version.min(now)),
                full,
            },
            None => ChangeCursor {
                version: present.version,
                incarnation: present.incarnation,
                made_at: now,
                full: false,
            },
        };
        ChangePage { changes, cursor, caught_up: last.is_none(), full }
    }
}

/// What the database has of an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Present {
    /// The version of the owner's clock: that of the last change, or 0 if there was none.
    version: i64,
    /// The history that the versions belong to.
    incarnation: Uuid,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::id::TodoId;

    const PRESENT: Present = Present { version: 900, incarnation: Uuid::from_u128(7) };

    fn change(version: i64) -> Change {
        Change::Deleted(DeletedTodo { id: TodoId::any(), content: None, version })
    }

    fn cursor(version: i64, made_at: i64, full: bool) -> ChangeCursor {
        ChangeCursor { version, incarnation: PRESENT.incarnation, made_at, full }
    }

    #[test]
    fn a_full_sync_ends_when_it_has_caught_up() {
        let first = StartAt::Beginning.page(PRESENT, vec![change(3)], true, 1_000);
        assert_eq!((first.full, first.caught_up), (true, false));
        assert_eq!(first.cursor, cursor(3, 1_000, true));
        let last = StartAt::Cursor(first.cursor).page(PRESENT, vec![change(5)], false, 1_001);
        assert_eq!((last.full, last.caught_up), (true, true));
        assert_eq!(last.cursor, cursor(900, 1_001, false));
        let next = StartAt::Cursor(last.cursor).page(PRESENT, Vec::new(), false, 1_002);
        assert_eq!((next.full, next.caught_up), (false, true));
    }

    /// Otherwise a client that reads an old page every month would miss deletions that the sweep
    /// has removed.
    #[test]
    fn a_cursor_is_as_old_as_the_last_page_that_had_caught_up() {
        let at = |version, made_at| StartAt::Cursor(cursor(version, made_at, false));
        let page = |start: StartAt| start.page(PRESENT, vec![change(300)], true, 1_000).cursor;
        assert_eq!(page(at(100, 500)).made_at, 500);
        assert_eq!(page(at(100, 200)).made_at, 300, "deletions before it are not needed");
        let caught_up = at(100, 200).page(PRESENT, vec![change(300)], false, 1_000).cursor;
        assert_eq!(caught_up.made_at, 1_000);
    }

    #[test]
    fn a_cursor_of_another_history_has_expired() {
        let check = |cursor| match StartAt::Cursor(cursor).check(PRESENT) {
            Ok(()) => None,
            Err(Error::CursorExpired(cause)) => Some(cause),
            Err(error) => panic!("{error}"),
        };
        assert_eq!(check(cursor(900, 0, false)), None);
        assert_eq!(check(cursor(901, 0, false)), Some(ExpiredCursor::Future));
        let restored = ChangeCursor { incarnation: Uuid::nil(), ..cursor(1, 0, false) };
        assert_eq!(check(restored), Some(ExpiredCursor::Restored));
        StartAt::Beginning.check(PRESENT).expect("no cursor");
        StartAt::Present.check(PRESENT).expect("no cursor");
    }
}
