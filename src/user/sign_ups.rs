//! How many accounts a peer may ask for.
//!
//! Signing up costs a hash and a row, and tells which names are taken; so does a change of
//! name that is refused. Both are counted for the peer: an address, or an IPv6 network. The
//! counts are in the memory of this process: each replica has its own.

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quick_cache::sync::Cache;
use tokio::time::Instant;

use crate::{caller::Peer, error::Error, peers::network};

/// The time for which the limit is.
const WINDOW: Duration = Duration::from_mins(1);

/// Peers that are kept, some 150 bytes each, so 3 MiB at the most. Beyond, those that
/// asked for nothing lately are forgotten.
const MAX_PEERS: usize = 20_000;

/// Counts what peers ask for.
#[derive(Debug)]
pub struct SignUps {
    limit: u32,
    peers: Cache<IpAddr, Arc<Mutex<Minute>>>,
}

/// What a peer asked for since the first of it, for a minute.
#[derive(Debug, Default)]
struct Minute {
    taken: u32,
    /// `None` before the first.
    ends_at: Option<Instant>,
}

impl SignUps {
    /// Lets each peer have `per_minute` of them.
    #[must_use]
    pub fn new(per_minute: u32) -> Self {
        Self { limit: per_minute, peers: Cache::new(MAX_PEERS) }
    }

    /// Takes one of the peer's; [`Error::TooManyAttempts`] until the minute ends if there
    /// is none left.
    pub(super) fn take(&self, Peer(ip): Peer, now: Instant) -> Result<Taken, Error> {
        let new = || Ok::<_, std::convert::Infallible>(Arc::default());
        let Ok(minute) = self.peers.get_or_insert_with(&network(ip), new);
        let ends_at = lock(&minute).take(self.limit, now)?;
        Ok(Taken { minute, ends_at, counts: false })
    }
}

impl Minute {
    /// Gives the end of the minute in which it was taken.
    fn take(&mut self, limit: u32, now: Instant) -> Result<Instant, Error> {
        let ends_at = self.ends_at.filter(|ends_at| *ends_at > now).unwrap_or_else(|| {
            self.taken = 0;
            now + WINDOW
        });
        self.ends_at = Some(ends_at);
        if self.taken >= limit {
            return Err(Error::TooManyAttempts { retry_after: ends_at - now });
        }
        self.taken += 1;
        Ok(ends_at)
    }
}

/// One of those that a peer may have. Dropped before it counts, it is given back.
#[derive(Debug)]
pub(super) struct Taken {
    minute: Arc<Mutex<Minute>>,
    ends_at: Instant,
    counts: bool,
}

impl Taken {
    /// Something came of it, or was told, that is to be counted.
    pub(super) fn count(mut self) {
        self.counts = true;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut minute = lock(&self.minute);
        if !self.counts && minute.ends_at == Some(self.ends_at) {
            minute.taken -= 1;
        }
    }
}

fn lock(minute: &Mutex<Minute>) -> MutexGuard<'_, Minute> {
    minute.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(ip: &str) -> Peer {
        Peer(ip.parse().expect("an address"))
    }

    /// When to come again, if there is none left.
    fn refused(sign_ups: &SignUps, ip: &str, now: Instant) -> Option<Duration> {
        match sign_ups.take(peer(ip), now) {
            Ok(taken) => {
                taken.count();
                None
            }
            Err(Error::TooManyAttempts { retry_after }) => Some(retry_after),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_peer_has_so_many_a_minute() {
        let (sign_ups, begun) = (SignUps::new(3), Instant::now());
        let at = |seconds| begun + Duration::from_secs(seconds);
        for seconds in [0, 10, 20] {
            assert_eq!(refused(&sign_ups, "2001:db8::1", at(seconds)), None);
        }
        assert_eq!(refused(&sign_ups, "2001:db8::2", at(20)), Some(Duration::from_secs(40)));
        assert_eq!(refused(&sign_ups, "2001:db8:0:1::1", at(20)), None, "another network");
        assert_eq!(refused(&sign_ups, "192.0.2.1", at(20)), None);
        for _ in 0..3 {
            assert_eq!(refused(&sign_ups, "2001:db8::1", at(60)), None, "the next minute");
        }
        assert!(refused(&sign_ups, "2001:db8::1", at(60)).is_some());
    }

    #[test]
    fn what_is_given_back_is_free_again_in_its_minute() {
        let (sign_ups, now) = (SignUps::new(1), Instant::now());
        let taken = sign_ups.take(peer("192.0.2.1"), now).expect("free");
        assert!(refused(&sign_ups, "192.0.2.1", now).is_some());
        drop(taken);
        let early = sign_ups.take(peer("192.0.2.1"), now).expect("free again");
        let later = now + WINDOW;
        assert_eq!(refused(&sign_ups, "192.0.2.1", later), None);
        drop(early);
        assert!(refused(&sign_ups, "192.0.2.1", later).is_some(), "that was another minute");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let (sign_ups, now) = (SignUps::new(1), Instant::now());
        for bits in 0..u32::try_from(2 * MAX_PEERS).expect("few") {
            let ip = IpAddr::from(std::net::Ipv4Addr::from_bits(bits));
            sign_ups.take(Peer(ip), now).expect("free").count();
        }
        assert!(sign_ups.peers.len() <= MAX_PEERS, "{}", sign_ups.peers.len());
    }
}
