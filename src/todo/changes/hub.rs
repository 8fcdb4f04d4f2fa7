//! Wakes the watches of owners whose clock has moved.
//!
//! One poll a second for all watched owners makes it correct, whatever replica wrote. A write on
//! this replica wakes the watches of its owner at once.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;

use super::{
    Present,
    store::{ChangeStore, Poll},
};
use crate::{
    rpc::error::Error,
    telemetry::metrics::WatchMetrics,
    types::{error_chain::ErrorChain, id::UserId, jitter::with_jitter},
};

/// The interval in which a replica polls the clocks of all watched owners.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// How long a poll may take.
///
/// Test: `a_poll_that_hangs_is_repeated`.
const POLL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the database may be unavailable until watches end: other replicas may reach it.
///
/// Test: `watches_end_thirty_seconds_after_the_last_poll`.
pub(super) const OUTAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Pages that watches read at once, so that watches that reconnect together leave connections to
/// unary calls.
///
/// Test: `watches_read_two_pages_at_once`.
const MAX_CONCURRENT_READS: usize = 2;

/// The number of owners whose poll is passed on before writes get the lock.
const OWNERS_PER_LOCK: usize = 1_000;

/// What is known of the clock of an owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Signal {
    /// The latest version that a write on this replica has returned.
    pub(super) written: i64,
    /// The result of the last poll.
    pub(super) polled: Option<Polled>,
}

/// The result of a poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Polled {
    pub(super) present: Present,
    /// A time before the poll, in microseconds since 1970.
    pub(super) at: i64,
}

/// The watches of a replica.
#[derive(Clone, Debug)]
pub(crate) struct WatchHub(Arc<State>);

#[derive(Debug)]
struct State {
    owners: Mutex<HashMap<UserId, Owner>>,
    max_watches_per_owner: usize,
    /// Notified when the first watch starts, and when the hub is dropped.
    first_watch: Arc<Notify>,
    /// The last time at which the database responded, or the first watch started.
    last_success: Mutex<Instant>,
    /// Whether that was [`OUTAGE_TIMEOUT`] ago.
    outage: watch::Sender<bool>,
    reads: Arc<Semaphore>,
    metrics: WatchMetrics,
}

#[derive(Debug)]
struct Owner {
    signal: watch::Sender<Signal>,
    watches: usize,
}

/// The watch of one stream over its owner.
#[derive(Debug)]
pub(super) struct OwnerWatch {
    owner_id: UserId,
    pub(super) signal: watch::Receiver<Signal>,
    pub(super) outage: watch::Receiver<bool>,
    hub: WatchHub,
}

impl WatchHub {
    /// Creates a hub without watches.
    pub(crate) fn new(max_watches_per_owner: usize, metrics: WatchMetrics) -> Self {
        Self(Arc::new(State {
            owners: Mutex::default(),
            max_watches_per_owner,
            first_watch: Arc::default(),
            last_success: Mutex::new(Instant::now()),
            outage: watch::Sender::new(false),
            reads: Arc::new(Semaphore::new(MAX_CONCURRENT_READS)),
            metrics,
        }))
    }

    /// Starts to poll the clocks until the hub is dropped.
    pub(super) fn start(&self, store: ChangeStore) {
        let poll = move |owner_ids: Vec<Uuid>| {
            let store = store.clone();
            async move { store.poll(&owner_ids).await }
        };
        tokio::spawn(poll_until_dropped(Arc::downgrade(&self.0), poll));
    }

    /// Adds a watch.
    ///
    /// # Errors
    /// [`Error::Overloaded`] if the owner has too many.
    pub(super) fn watch(&self, owner_id: UserId) -> Result<OwnerWatch, Error> {
        let mut owners = self.0.owners();
        let owner = owners.entry(owner_id);
        let owner = owner.or_insert_with(|| Owner { signal: <_>::default(), watches: 0 });
        if owner.watches >= self.0.max_watches_per_owner {
            return Err(Error::Overloaded);
        }
        owner.watches += 1;
        let signal = owner.signal.subscribe();
        self.0.metrics.open.inc();
        if owners.len() == 1 {
            self.0.first_watch.notify_one();
        }
        let outage = self.0.outage.subscribe();
        Ok(OwnerWatch { owner_id, signal, outage, hub: self.clone() })
    }

    /// Wakes the watches of an owner after a write with this version.
    pub(in crate::todo) fn wake(&self, owner_id: UserId, version: i64) {
        if let Some(owner) = self.0.owners().get(&owner_id) {
            owner.signal.send_if_modified(|signal| {
                let is_newer = version > signal.written;
                signal.written = signal.written.max(version);
                is_newer
            });
        }
    }

    /// Waits for the permit to read a page.
    pub(super) async fn acquire_read(&self) -> Option<OwnedSemaphorePermit> {
        self.0.reads.clone().acquire_owned().await.ok()
    }

    /// Ends an outage: a read of a watch has succeeded.
    pub(super) fn record_read(&self) {
        self.0.record_success(Instant::now());
    }

    /// Returns the metrics of watches.
    pub(super) fn metrics(&self) -> &WatchMetrics {
        &self.0.metrics
    }
}

impl OwnerWatch {
    /// Returns the hub.
    pub(super) fn hub(&self) -> &WatchHub {
        &self.hub
    }
}

impl Drop for OwnerWatch {
    fn drop(&mut self) {
        self.hub.0.metrics.open.dec();
        let mut owners = self.hub.0.owners();
        if let Some(owner) = owners.get_mut(&self.owner_id) {
            owner.watches -= 1;
            if owner.watches == 0 {
                owners.remove(&self.owner_id);
            }
        }
    }
}

impl State {
    fn owners(&self) -> MutexGuard<'_, HashMap<UserId, Owner>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owner_ids(&self) -> Vec<Uuid> {
        self.owners().keys().map(|id| id.as_uuid()).collect()
    }

    /// Records that the database responded to what was sent to it then.
    fn record_success(&self, sent_at: Instant) {
        let mut last_success = self.last_success.lock().unwrap_or_else(PoisonError::into_inner);
        *last_success = sent_at.max(*last_success);
        drop(last_success);
        self.check_outage();
    }

    /// Notifies watches when an outage begins or ends. Returns whether there is one.
    fn check_outage(&self) -> bool {
        let last_success = self.last_success.lock().unwrap_or_else(PoisonError::into_inner);
        let is_outage = last_success.elapsed() >= OUTAGE_TIMEOUT;
        self.outage.send_if_modified(|outage| std::mem::replace(outage, is_outage) != is_outage);
        is_outage
    }

    /// Passes the result of a poll on to the watches of the owners that it named. An owner without
    /// a clock has no changes.
    fn set_polled(&self, owner_ids: &[Uuid], poll: &Poll) {
        let versions: HashMap<_, _> = poll.clocks.iter().copied().collect();
        // In parts, because every write needs the lock, too.
        for ids in owner_ids.chunks(OWNERS_PER_LOCK) {
            let owners = self.owners();
            for id in ids {
                let version = versions.get(id).copied().unwrap_or_default();
                let present = Present { version, incarnation: poll.incarnation };
                if let Some(owner) = owners.get(&UserId::from_uuid(*id)) {
                    owner.signal.send_if_modified(|signal| {
                        let before = signal.polled.replace(Polled { present, at: poll.at });
                        // An idle watch reads the time of the poll when its checkpoint is due.
                        before.is_none_or(|before| before.present != present)
                    });
                }
            }
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.first_watch.notify_one();
    }
}

/// Polls the clocks of the watched owners every [`POLL_INTERVAL`]. Without watches, it polls
/// nothing.
async fn poll_until_dropped<F>(state: Weak<State>, poll: impl Fn(Vec<Uuid>) -> F)
where
    F: Future<Output = Result<Poll, Error>>,
{
    loop {
        let Some(hub) = state.upgrade() else { return };
        let owner_ids = hub.owner_ids();
        if owner_ids.is_empty() {
            let first_watch = hub.first_watch.clone();
            drop(hub);
            first_watch.notified().await;
            if let Some(hub) = state.upgrade() {
                hub.record_success(Instant::now());
            }
            continue;
        }
        let started = Instant::now();
        let polled = timeout(POLL_TIMEOUT, poll(owner_ids.clone())).await;
        hub.metrics.poll_duration.observe(started.elapsed().as_secs_f64());
        let error = match polled {
            Ok(Ok(polled)) => {
                hub.record_success(started);
                hub.set_polled(&owner_ids, &polled);
                None
            }
            Ok(Err(error)) => Some(ErrorChain(&error).to_string()),
            Err(elapsed) => Some(elapsed.to_string()),
        };
        if let Some(error) = error {
            let is_outage = hub.check_outage();
            tracing::debug!(error, is_outage, "failed to poll the clocks of watched todos");
        }
        drop(hub);
        sleep(with_jitter(POLL_INTERVAL)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::atomic::{AtomicU32, Ordering},
    };

    use super::*;

    fn hub(max_watches_per_owner: usize) -> WatchHub {
        WatchHub::new(max_watches_per_owner, WatchMetrics::default())
    }

    /// Starts polls, each of which has this result: `None` hangs. Returns their number.
    fn start(hub: &WatchHub, result: fn(u32) -> Option<Result<Poll, Error>>) -> Arc<AtomicU32> {
        let polls = Arc::<AtomicU32>::default();
        let counted = polls.clone();
        tokio::spawn(poll_until_dropped(Arc::downgrade(&hub.0), move |owner_ids: Vec<Uuid>| {
            assert!(!owner_ids.is_empty());
            let result = result(counted.fetch_add(1, Ordering::Relaxed));
            async move {
                match result {
                    Some(result) => result,
                    None => pending().await,
                }
            }
        }));
        polls
    }

    fn empty() -> Poll {
        Poll { at: 0, incarnation: Uuid::nil(), clocks: Vec::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_poll_that_hangs_is_repeated() {
        let hub = hub(1);
        start(&hub, |number| (number > 0).then(|| Ok(empty())));
        let mut watch = hub.watch(UserId::any()).expect("the first one");
        let started = Instant::now();
        watch.signal.wait_for(|signal| signal.polled.is_some()).await.expect("a hub");
        assert!(started.elapsed() < Duration::from_secs(7), "{:?}", started.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_polled_without_watches() {
        let hub = hub(2);
        let polls = start(&hub, |_| Some(Ok(empty())));
        sleep(Duration::from_mins(1)).await;
        assert_eq!(polls.load(Ordering::Relaxed), 0);
        let owner_id = UserId::any();
        let watches = (hub.watch(owner_id), hub.watch(owner_id), hub.watch(UserId::any()));
        assert!(matches!(hub.watch(owner_id), Err(Error::Overloaded)));
        sleep(Duration::from_mins(1)).await;
        drop(watches);
        let polled = polls.load(Ordering::Relaxed);
        assert!((54..=67).contains(&polled), "{polled}");
        sleep(Duration::from_mins(1)).await;
        assert_eq!(polls.load(Ordering::Relaxed), polled);
        assert!(hub.0.owners().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_thirty_seconds_ends_watches() {
        let hub = hub(1);
        start(&hub, |number| match number {
            // Two outages, of which only the second one is long enough.
            0 | 20 => Some(Ok(empty())),
            _ => Some(Err(Error::DatabaseUnavailable("unreachable".into()))),
        });
        let mut watch = hub.watch(UserId::any()).expect("the first one");
        let started = Instant::now();
        watch.outage.wait_for(|outage| *outage).await.expect("a hub");
        let seconds = started.elapsed().as_secs();
        assert!((46..=56).contains(&seconds), "{seconds}");
    }

    #[test]
    fn a_write_wakes_the_watches_of_its_owner_only() {
        let hub = hub(2);
        let owner_id = UserId::any();
        let mut first = hub.watch(owner_id).expect("the first one");
        let second = hub.watch(owner_id).expect("the second one");
        let other = hub.watch(UserId::any()).expect("another owner");
        hub.wake(owner_id, 7);
        let has_changed =
            [&first, &second, &other].map(|watch| watch.signal.has_changed().expect("a hub"));
        assert_eq!(has_changed, [true, true, false]);
        assert_eq!(first.signal.borrow_and_update().written, 7);
        hub.wake(owner_id, 6);
        assert!(!first.signal.has_changed().expect("a hub"), "an older write says nothing new");
    }
}
