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

use tokio::time::sleep;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{error::Error, peers::Share};

/// How long a caller may take to read an answer: at least this, at most twice this. Who
/// reads slower has the connection end: otherwise a few slow readers would keep all the
/// memory.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection over which a call comes.
#[derive(Debug)]
pub struct Origin {
    pub(super) ip: IpAddr,
    /// The share of whoever connected.
    pub(super) share: Arc<Share>,
    pub(super) calls: TaskTracker,
    /// Cancelled when the connection is told to end: streams do.
    ending: CancellationToken,
    /// How many answers are made and not sent: those of this turn, and those of the one
    /// before, by turns.
    unsent: [AtomicUsize; 2],
    turn: AtomicUsize,
}

impl Origin {
    /// A connection from this address, whose streams end when `ending` is cancelled.
    #[must_use]
    pub fn new(ip: IpAddr, share: Arc<Share>, ending: CancellationToken) -> Self {
        let (calls, unsent, turn) = <_>::default();
        Self { ip, share, calls, ending, unsent, turn }
    }

    /// Whether no call is under way on it.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.calls.is_empty()
    }

    /// Waits until an answer is not read in time.
    pub async fn is_stuck(&self) {
        loop {
            sleep(READ_TIMEOUT).await;
            let next = (self.turn.load(Ordering::Relaxed) + 1) % self.unsent.len();
            if self.unsent[next].load(Ordering::Relaxed) > 0 {
                return;
            }
            self.turn.store(next, Ordering::Relaxed);
        }
    }

    /// Waits until streams have to end: with the connection, or after their lifetime. Why.
    pub(super) fn ending(&self, lifetime: Option<Duration>) -> impl Future<Output = Error> + use<> {
        let ending = self.ending.clone();
        async move {
            let age = async {
                match lifetime {
                    Some(lifetime) => sleep(lifetime).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = ending.cancelled() => Error::Stopping,
                () = age => Error::DeadlineExceeded,
            }
        }
    }

    /// Counts an answer until it is sent.
    pub(super) fn sending(self: &Arc<Self>) -> Sending {
        let turn = self.turn.load(Ordering::Relaxed);
        self.unsent[turn].fetch_add(1, Ordering::Relaxed);
        Sending { origin: self.clone(), turn }
    }
}

/// Stands for an answer that is made and not sent.
#[derive(Debug)]
pub struct Sending {
    origin: Arc<Origin>,
    turn: usize,
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.origin.unsent[self.turn].fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::time::{Instant, timeout};

    use super::*;
    use crate::peers::{Limits, Peers};

    #[tokio::test(start_paused = true)]
    async fn an_answer_has_between_one_and_two_times_the_limit() {
        let ip = IpAddr::from(Ipv4Addr::LOCALHOST);
        let peers = Peers::new(Limits { connections: 1, calls: 1, open_calls: 1, memory: 1 });
        let origin = Arc::new(Origin::new(ip, peers.share(ip), CancellationToken::new()));
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
