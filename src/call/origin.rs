//! The connection over which calls come.

use std::{
    future::pending,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{error::Error, peers::Share};

/// How long a caller may take to read an answer: at least this, at most twice this. Who
/// reads slower has the connection end: otherwise a few slow readers would keep all the
/// memory.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a stream of reflection may be open: longer than any tool needs to ask all it
/// wants to know. One that cannot be told of its end, because the caller does not read,
/// has the connection end, after twice this time at the latest.
pub(super) const MAX_REFLECTION: Duration = Duration::from_secs(30);

/// The connection over which a call comes.
#[derive(Debug)]
pub struct Origin {
    pub(super) ip: IpAddr,
    /// The share of whoever connected.
    pub(super) share: Arc<Share>,
    pub(super) calls: TaskTracker,
    /// Cancelled when the connection is told to end: streams do.
    ending: CancellationToken,
    /// Answers that are made and not sent.
    unsent: Arc<Turns>,
    /// Streams of reflection.
    streams: Arc<Turns>,
}

impl Origin {
    /// A connection from this address, whose streams end when `ending` is cancelled.
    #[must_use]
    pub fn new(ip: IpAddr, share: Arc<Share>, ending: CancellationToken) -> Self {
        let (unsent, streams) = (Turns::of(READ_TIMEOUT), Turns::of(MAX_REFLECTION));
        Self { ip, share, calls: TaskTracker::new(), ending, unsent, streams }
    }

    /// Whether no call is under way on it.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.calls.is_empty()
    }

    /// Whether one call at the most is under way.
    #[must_use]
    pub fn has_one_call(&self) -> bool {
        self.calls.len() <= 1
    }

    /// Waits until an answer is not read in time.
    pub async fn is_stuck(&self) {
        tokio::select! {
            () = self.unsent.are_old() => {}
            () = self.streams.are_old() => {}
        }
    }

    /// Waits until streams have to end: with the connection, or at their own end. Why.
    pub(super) fn ending(&self, end: Option<Instant>) -> impl Future<Output = Error> + use<> {
        let ending = self.ending.clone();
        async move {
            let age = async {
                match end {
                    Some(end) => sleep_until(end).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = ending.cancelled() => Error::Stopping,
                () = age => Error::DeadlineExceeded,
            }
        }
    }

    /// Counts an answer until it is sent, or what has to wait to be written until it is.
    #[must_use]
    pub fn sending(&self) -> Sending {
        self.unsent.begin()
    }

    /// Counts a stream of reflection until it has ended.
    pub(super) fn streaming(&self) -> Sending {
        self.streams.begin()
    }
}

/// Counts what is to end in time: what began in this turn, and in the one before, by turns.
/// No timer for each, and no list of them.
#[derive(Debug)]
struct Turns {
    length: Duration,
    counts: [AtomicUsize; 2],
    turn: AtomicUsize,
}

impl Turns {
    fn of(length: Duration) -> Arc<Self> {
        Arc::new(Self { length, counts: <_>::default(), turn: <_>::default() })
    }

    /// Waits until something is older than a turn. It is not older than two.
    async fn are_old(&self) {
        loop {
            sleep(self.length).await;
            let next = (self.turn.load(Ordering::Relaxed) + 1) % self.counts.len();
            if self.counts[next].load(Ordering::Relaxed) > 0 {
                return;
            }
            self.turn.store(next, Ordering::Relaxed);
        }
    }

    fn begin(self: &Arc<Self>) -> Sending {
        let turn = self.turn.load(Ordering::Relaxed);
        self.counts[turn].fetch_add(1, Ordering::Relaxed);
        Sending { turns: self.clone(), turn }
    }
}

/// Stands for an answer that is not sent, or a stream that has not ended.
#[derive(Debug)]
pub struct Sending {
    turns: Arc<Turns>,
    turn: usize,
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.turns.counts[self.turn].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::time::{Instant, timeout};

    use super::*;
    use crate::peers::{Limits, Peers};

    fn origin(ending: CancellationToken) -> Origin {
        let ip = IpAddr::from(Ipv4Addr::LOCALHOST);
        Origin::new(ip, Peers::new(Limits::default()).share(ip), ending)
    }

    #[tokio::test(start_paused = true)]
    async fn streams_end_after_their_lifetime_or_with_the_connection() {
        let token = CancellationToken::new();
        let origin = origin(token.clone());
        let begun = Instant::now();
        let end = Some(begun + MAX_REFLECTION);
        let ended = origin.ending(end).await;
        assert!(matches!(ended, Error::DeadlineExceeded), "{ended:?}");
        assert_eq!(begun.elapsed(), MAX_REFLECTION);

        let day = Duration::from_hours(24);
        assert!(timeout(day, origin.ending(None)).await.is_err(), "some have no lifetime");
        token.cancel();
        for end in [None, Some(Instant::now() + MAX_REFLECTION)] {
            let ended = origin.ending(end).await;
            assert!(matches!(ended, Error::Stopping), "{ended:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_outlives_its_lifetime_is_stuck() {
        let origin = origin(CancellationToken::new());
        drop(origin.streaming());
        let begun = Instant::now();
        let _stream = origin.streaming();
        origin.is_stuck().await;
        assert!((MAX_REFLECTION..=MAX_REFLECTION * 2).contains(&begun.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_between_one_and_two_times_the_limit() {
        let origin = origin(CancellationToken::new());
        let stuck = origin.is_stuck();
        tokio::pin!(stuck);
        // Those that are read in time, however many, and whenever they are made.
        for _ in 0..20 {
            let sending = origin.sending();
            assert!(timeout(READ_TIMEOUT.mul_f64(0.9), stuck.as_mut()).await.is_err());
            drop(sending);
        }
        let begun = Instant::now();
        let _sending = origin.sending();
        stuck.await;
        assert!((READ_TIMEOUT..=READ_TIMEOUT * 2).contains(&begun.elapsed()));
    }
}
