//! Who is at the other end, and what of the things that all share one peer may have, so
//! that none has all of them.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Semaphore;

/// Whom an address stands for: whoever has one IPv6 address has the /64 around it.
#[must_use]
pub fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => ip.into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64)).into(),
    }
}

/// What one peer may have at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits {
    /// Open connections.
    pub connections: usize,
    /// Calls that are let in or wait for that.
    pub calls: usize,
    /// Calls of health, streams included.
    pub health_calls: usize,
    /// Large answers that are made or not sent.
    pub large_answers: usize,
}

/// The peers that have something at the moment.
#[derive(Debug)]
pub struct Peers {
    limits: Limits,
    present: Mutex<HashMap<IpAddr, Weak<Share>>>,
}

impl Peers {
    /// Gives each as much as that.
    #[must_use]
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, present: Mutex::default() })
    }

    /// The share of the peer at an address.
    pub fn share(self: &Arc<Self>, ip: IpAddr) -> Arc<Share> {
        let network = network(ip);
        let mut present = self.present();
        if let Some(share) = present.get(&network).and_then(Weak::upgrade) {
            return share;
        }
        let limited = |limit| Arc::new(Semaphore::new(limit));
        let share = Arc::new(Share {
            connections: limited(self.limits.connections),
            calls: Semaphore::new(self.limits.calls),
            health_calls: limited(self.limits.health_calls),
            memory: AtomicUsize::new(0),
            large_answers: limited(self.limits.large_answers),
            network,
            peers: self.clone(),
        });
        present.insert(network, Arc::downgrade(&share));
        share
    }

    fn present(&self) -> MutexGuard<'_, HashMap<IpAddr, Weak<Share>>> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one peer has left of its [`Limits`]. Who keeps a permit keeps the share with it: a
/// new one would be whole.
#[derive(Debug)]
pub struct Share {
    /// For connections.
    pub connections: Arc<Semaphore>,
    /// For calls that are let in or wait for that.
    pub calls: Semaphore,
    /// For calls of health.
    pub health_calls: Arc<Semaphore>,
    /// For large answers.
    pub large_answers: Arc<Semaphore>,
    /// What its calls and their messages take, in KiB.
    memory: AtomicUsize,
    network: IpAddr,
    peers: Arc<Peers>,
}

impl Share {
    /// Counts so many KiB more. How many it has then.
    pub fn take_memory(&self, size: u32) -> usize {
        self.memory.fetch_add(size as usize, Ordering::Relaxed) + size as usize
    }

    /// Counts so many KiB less.
    pub fn give_memory_back(&self, size: u32) {
        self.memory.fetch_sub(size as usize, Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut present = self.peers.present();
        // The peer may have come back meanwhile.
        if present.get(&self.network).is_some_and(|share| share.strong_count() == 0) {
            present.remove(&self.network);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn a_peer_is_an_address_or_a_network_of_ipv6() {
        let peers = Peers::new(Limits::default());
        let share = peers.share(ip("2001:db8::1"));
        for same in ["2001:db8::2", "2001:db8::ffff:0:0:3"] {
            assert!(Arc::ptr_eq(&share, &peers.share(ip(same))), "{same}");
        }
        for other in ["2001:db8:0:1::1", "192.0.2.1", "192.0.2.2"] {
            assert!(!Arc::ptr_eq(&share, &peers.share(ip(other))), "{other}");
        }
    }

    #[test]
    fn a_share_stays_as_long_as_somebody_has_it() {
        let peers = Peers::new(Limits { connections: 1, ..Limits::default() });
        let share = peers.share(ip("192.0.2.1"));
        let taken = share.connections.clone().try_acquire_owned().expect("one");
        assert_eq!(peers.share(ip("192.0.2.1")).connections.available_permits(), 0);
        assert_eq!(peers.share(ip("192.0.2.2")).connections.available_permits(), 1);
        drop((share, taken));
        assert!(peers.present().is_empty(), "nothing is kept for nobody");
        assert_eq!(peers.share(ip("192.0.2.1")).connections.available_permits(), 1);
    }
}
