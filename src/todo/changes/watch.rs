//! The watch of one stream: waits until its owner has changes, and reads them page by page.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::{
    ChangePage, Present, StartAt,
    cursor::ChangeCursor,
    hub::{OUTAGE_TIMEOUT, OwnerWatch, Signal},
    store::{ChangeStore, FIRST_WATCH_PAGE_BYTES, MAX_WATCH_PAGE_BYTES, PageLimits},
};
use crate::{
    limits::MAX_CALL_TIMEOUT,
    rpc::{error::Error, expired_cursor::ExpiredCursor},
    telemetry::traces::TraceContext,
    types::{id::UserId, jitter::with_jitter},
};

/// The interval of messages without changes: shorter than the idle timeouts of proxies.
///
/// Test: `an_idle_watch_sends_a_checkpoint_every_thirty_seconds`.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(30);

/// The pause before a checkpoint that is due, but has no poll that proves it, is tried again.
const CHECKPOINT_RETRY_DELAY: Duration = Duration::from_millis(500);

/// The maximum age of the poll that proves a checkpoint. Polls come every second, unless the
/// database is unavailable: then there is no checkpoint.
///
/// Test: `watches_end_thirty_seconds_after_the_last_poll`.
const MAX_POLL_AGE_MICROS: i64 = 3_000_000;

/// The pause after a read that found no database.
const READ_RETRY_DELAY: Duration = Duration::from_secs(1);

/// How long a watch whose owner has lost the clock waits for the end of its session: the user was
/// deleted. Other replicas notice that within 5 seconds.
///
/// Test: `the_watches_of_a_deleted_user_end_during_a_full_sync_too`.
const DELETED_USER_DELAY: Duration = Duration::from_secs(6);

/// A watch of the changes of an owner.
#[derive(Debug)]
pub(super) struct Watch {
    owner_id: UserId,
    store: ChangeStore,
    hub: OwnerWatch,
    start: StartAt,
    /// The maximum size of the next page, in bytes.
    page_bytes: i64,
    /// Whether the last page has caught up.
    caught_up: bool,
    /// Whether a page was read.
    has_read: bool,
    /// Whether a page has caught up: changes from then on are new.
    is_live: bool,
    /// What was known before the last read, whose page includes it.
    known: Signal,
    checkpoint_at: Instant,
}

impl Watch {
    pub(super) fn new(
        owner_id: UserId,
        store: ChangeStore,
        hub: OwnerWatch,
        start: StartAt,
    ) -> Self {
        Self {
            owner_id,
            store,
            hub,
            start,
            page_bytes: FIRST_WATCH_PAGE_BYTES,
            caught_up: false,
            has_read: false,
            is_live: false,
            known: Signal::default(),
            checkpoint_at: Instant::now(),
        }
    }

    /// Waits for the next page. Without changes, it is a checkpoint.
    ///
    /// # Errors
    /// [`Error::CursorExpired`], or [`Error::DatabaseUnavailable`] after [`OUTAGE_TIMEOUT`].
    pub(super) async fn next(&mut self) -> Result<ChangePage, Error> {
        let page = match self.idle_cursor() {
            None => self.read().await?,
            Some(cursor) => match self.wait(cursor).await? {
                Some(checkpoint) => checkpoint,
                None => self.read().await?,
            },
        };
        self.observe_lag(&page);
        self.start = StartAt::Cursor(page.cursor);
        self.caught_up = page.caught_up;
        self.has_read = true;
        self.page_bytes = (2 * self.page_bytes).min(MAX_WATCH_PAGE_BYTES);
        self.is_live |= page.caught_up;
        self.checkpoint_at = Instant::now() + with_jitter(CHECKPOINT_INTERVAL);
        Ok(page)
    }

    /// Returns the cursor, if the last page has caught up.
    fn idle_cursor(&self) -> Option<ChangeCursor> {
        match self.start {
            StartAt::Cursor(cursor) if self.caught_up => Some(cursor),
            _ => None,
        }
    }

    /// Waits until there are changes after the cursor, or until a checkpoint is due, and returns it.
    async fn wait(&mut self, cursor: ChangeCursor) -> Result<Option<ChangePage>, Error> {
        loop {
            if has_changes(*self.hub.signal.borrow_and_update(), self.known, cursor) {
                return Ok(None);
            }
            tokio::select! {
                // The sender lives as long as the watch.
                _ = self.hub.signal.changed() => {}
                _ = self.hub.outage.wait_for(|outage| *outage) => {
                    return Err(Error::DatabaseUnavailable("no poll has succeeded".into()));
                }
                () = sleep_until(self.checkpoint_at) => {
                    let signal = *self.hub.signal.borrow();
                    if let Some(cursor) = checkpoint(signal, self.known, cursor, self.store.now()) {
                        let changes = Vec::new();
                        return Ok(Some(ChangePage { changes, cursor, caught_up: true, full: false }));
                    }
                    self.checkpoint_at = Instant::now() + CHECKPOINT_RETRY_DELAY;
                }
            }
        }
    }

    /// Reads the next page. While the database is unavailable, it tries again. A statement that
    /// takes too long, for example behind the lock of a migration, is the same to a watch.
    async fn read(&mut self) -> Result<ChangePage, Error> {
        let started = Instant::now();
        loop {
            self.known = *self.hub.signal.borrow();
            let error = match self.try_read().await {
                Err(error @ Error::DatabaseUnavailable(_)) => error,
                Err(Error::DeadlineExceeded) => {
                    Error::DatabaseUnavailable("a read has timed out".into())
                }
                Err(error @ Error::CursorExpired(ExpiredCursor::Future)) if self.has_read => {
                    sleep(DELETED_USER_DELAY).await;
                    return Err(error);
                }
                Ok(page) => {
                    self.hub.hub().record_read();
                    return Ok(page);
                }
                result => return result,
            };
            if started.elapsed() >= OUTAGE_TIMEOUT {
                return Err(error);
            }
            sleep(with_jitter(READ_RETRY_DELAY)).await;
        }
    }

    /// Reads in a task of its own: HTTP/2 may not poll the stream for as long as the client likes,
    /// which must not hold a connection to the database.
    ///
    /// The statement of a watch that ends while it reads runs on, and holds the permit: otherwise
    /// watches that a client resets would hold all connections.
    async fn try_read(&self) -> Result<ChangePage, Error> {
        let (owner_id, start) = (self.owner_id, self.start);
        let limits = PageLimits::message(self.page_bytes);
        let (hub, store) = (self.hub.hub().clone(), self.store.clone());
        let read = async move {
            let permit = hub.acquire_read().await;
            let read = store.read(owner_id, start, limits, permit);
            let unavailable = |_| Error::DatabaseUnavailable("a read has timed out".into());
            timeout(MAX_CALL_TIMEOUT, read).await.map_err(unavailable)?
        };
        let task = tokio::spawn(TraceContext::current().in_context(read));
        AbortOnDropHandle::new(task).await.map_err(Error::internal)?
    }

    /// Observes how old the changes are. Those of the first pages are older than the watch.
    fn observe_lag(&self, page: &ChangePage) {
        let metrics = self.hub.hub().metrics();
        metrics.changes.inc_by(page.changes.len() as u64);
        if !self.is_live {
            return;
        }
        let now = self.store.now();
        for change in &page.changes {
            let lag = now.saturating_sub(change.version()).max(0);
            metrics.lag.observe(Duration::from_micros(lag.unsigned_abs()).as_secs_f64());
        }
    }
}

/// Returns `true` if a watch at this cursor has to read: there is a change, or the database has
/// another history. `known` is what was known before the cursor was read: after a failover that has
/// lost writes, the cursor stays behind it.
fn has_changes(signal: Signal, known: Signal, cursor: ChangeCursor) -> bool {
    let present = Present { version: cursor.version, incarnation: cursor.incarnation };
    let is_written = signal.written > cursor.version.max(known.written);
    is_written
        || signal.polled.is_some_and(|polled| {
            // An older poll may have seen more than the read, if it took longer.
            let is_later = polled.at > cursor.made_at;
            let is_news = is_later || signal.polled != known.polled;
            is_news && polled.present.version > cursor.version
                || is_later && polled.present != present
        })
}

/// Returns the cursor with the time of the last poll, which proves that there are no changes. `now`
/// is in microseconds since 1970.
fn checkpoint(
    signal: Signal,
    known: Signal,
    cursor: ChangeCursor,
    now: i64,
) -> Option<ChangeCursor> {
    let polled = signal.polled.filter(|polled| polled.at > cursor.made_at)?;
    let is_recent = now.saturating_sub(polled.at) <= MAX_POLL_AGE_MICROS;
    let has_none = is_recent && !has_changes(signal, known, cursor);
    has_none.then_some(ChangeCursor { made_at: polled.at, ..cursor })
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::{super::hub::Polled, *};

    const CURSOR: ChangeCursor =
        ChangeCursor { version: 100, incarnation: Uuid::from_u128(1), made_at: 50, full: false };

    fn signal(written: i64, polled: Option<(i64, u128, i64)>) -> Signal {
        let polled = polled.map(|(version, incarnation, at)| {
            let incarnation = Uuid::from_u128(incarnation);
            Polled { present: Present { version, incarnation }, at }
        });
        Signal { written, polled }
    }

    #[test]
    fn a_watch_reads_when_the_clock_has_moved() {
        for (signal, reads) in [
            (signal(0, None), false),
            (signal(100, None), false),
            (signal(101, None), true),
            (signal(0, Some((100, 1, 51))), false),
            (signal(0, Some((101, 1, 51))), true),
            // A poll before the cursor was read, which the clock passed meanwhile.
            (signal(0, Some((99, 1, 50))), false),
            // A failover that has lost changes, and a restore.
            (signal(0, Some((99, 1, 51))), true),
            (signal(0, Some((100, 2, 51))), true),
        ] {
            let known = Signal::default();
            assert_eq!(has_changes(signal, known, CURSOR), reads, "{signal:?}");
        }
    }

    /// Otherwise the watch would read again and again until the clock has caught up.
    #[test]
    fn a_watch_reads_once_for_changes_that_the_database_has_lost() {
        let known = signal(200, Some((200, 1, 40)));
        assert!(!has_changes(known, known, CURSOR), "the page was read after it");
        assert!(has_changes(signal(201, Some((200, 1, 40))), known, CURSOR));
        assert!(
            has_changes(signal(200, Some((200, 1, 41))), known, CURSOR),
            "a poll that ended later"
        );
        assert!(
            has_changes(signal(200, Some((99, 1, 51))), known, CURSOR),
            "a poll that began later"
        );
        assert!(!has_changes(signal(200, Some((100, 1, 51))), known, CURSOR));
    }

    #[test]
    fn a_checkpoint_has_the_time_of_a_recent_poll_without_changes() {
        let checkpoint = |signal, now| checkpoint(signal, Signal::default(), CURSOR, now);
        let later = ChangeCursor { made_at: 51, ..CURSOR };
        let poll = signal(0, Some((100, 1, 51)));
        assert_eq!(checkpoint(poll, 60), Some(later));
        assert_eq!(checkpoint(poll, 51 + MAX_POLL_AGE_MICROS), Some(later));
        assert_eq!(
            checkpoint(poll, 52 + MAX_POLL_AGE_MICROS),
            None,
            "the database may be unavailable"
        );
        for signal in [
            signal(0, None),
            signal(0, Some((100, 1, 50))),
            signal(0, Some((101, 1, 51))),
            signal(101, Some((100, 1, 51))),
        ] {
            assert_eq!(checkpoint(signal, 60), None, "{signal:?}");
        }
    }
}
