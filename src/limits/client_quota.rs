//! Per-client quotas for connections, calls, streams and memory. No single client can exhaust
//! a shared limit.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::Semaphore;

/// Returns the key under which a client is limited: an IPv4 address, or the /64 of an IPv6
/// address, which is what one customer of a network gets.
#[must_use]
pub(crate) fn client_key(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => ip.into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64)).into(),
    }
}

/// The maximum that one client may hold at once.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ClientLimits {
    /// Open connections.
    pub(crate) connections: usize,
    /// Calls in flight, and calls that wait for a permit.
    pub(crate) calls: usize,
    /// Calls of the health service, streams included.
    pub(crate) health_calls: usize,
    /// Streams of the API.
    pub(crate) streams: usize,
    /// Reflection streams.
    pub(crate) reflection_streams: usize,
    /// Large responses that are being produced or sent.
    pub(crate) large_responses: usize,
}

/// The quotas of all clients that hold something.
#[derive(Debug)]
pub(crate) struct ClientQuotas {
    limits: ClientLimits,
    active: Mutex<HashMap<IpAddr, Weak<ClientQuota>>>,
}

impl ClientQuotas {
    /// Creates quotas of the same size for every client.
    #[must_use]
    pub(crate) fn new(limits: ClientLimits) -> Arc<Self> {
        Arc::new(Self { limits, active: Mutex::default() })
    }

    /// Returns the quota of the client at an address, and creates it if the client holds
    /// nothing yet.
    pub(crate) fn get(self: &Arc<Self>, ip: IpAddr) -> Arc<ClientQuota> {
        let key = client_key(ip);
        let mut active = self.active();
        if let Some(quota) = active.get(&key).and_then(Weak::upgrade) {
            return quota;
        }
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        let quota = Arc::new(ClientQuota {
            connections: semaphore(self.limits.connections),
            calls: Semaphore::new(self.limits.calls),
            health_calls: semaphore(self.limits.health_calls),
            streams: semaphore(self.limits.streams),
            reflection_streams: semaphore(self.limits.reflection_streams),
            large_responses: semaphore(self.limits.large_responses),
            memory_kib: AtomicUsize::new(0),
            key,
            quotas: self.clone(),
        });
        active.insert(key, Arc::downgrade(&quota));
        quota
    }

    fn active(&self) -> MutexGuard<'_, HashMap<IpAddr, Weak<ClientQuota>>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one client has left of its [`ClientLimits`].
///
/// An owner of a permit must own the quota as well: a quota that is created again has all of its
/// permits.
#[derive(Debug)]
pub(crate) struct ClientQuota {
    pub(crate) connections: Arc<Semaphore>,
    pub(crate) calls: Semaphore,
    pub(crate) health_calls: Arc<Semaphore>,
    pub(crate) streams: Arc<Semaphore>,
    pub(crate) reflection_streams: Arc<Semaphore>,
    pub(crate) large_responses: Arc<Semaphore>,
    /// Memory reserved for the client's calls and their messages.
    memory_kib: AtomicUsize,
    key: IpAddr,
    quotas: Arc<ClientQuotas>,
}

impl ClientQuota {
    /// Adds reserved memory, and returns the client's total. Both are in KiB.
    pub(crate) fn add_memory(&self, kib: u32) -> usize {
        self.memory_kib.fetch_add(kib as usize, Ordering::Relaxed) + kib as usize
    }

    /// Subtracts memory that was added before, in KiB.
    pub(crate) fn release_memory(&self, kib: u32) {
        self.memory_kib.fetch_sub(kib as usize, Ordering::Relaxed);
    }
}

impl Drop for ClientQuota {
    fn drop(&mut self) {
        let mut active = self.quotas.active();
        // The client may have a new quota already.
        if active.get(&self.key).is_some_and(|quota| quota.strong_count() == 0) {
            active.remove(&self.key);
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
    fn a_client_is_an_ipv4_address_or_an_ipv6_network() {
        let quotas = ClientQuotas::new(ClientLimits::default());
        let quota = quotas.get(ip("2001:db8::1"));
        for same in ["2001:db8::2", "2001:db8::ffff:0:0:3"] {
            assert!(Arc::ptr_eq(&quota, &quotas.get(ip(same))), "{same}");
        }
        for other in ["2001:db8:0:1::1", "192.0.2.1", "192.0.2.2"] {
            assert!(!Arc::ptr_eq(&quota, &quotas.get(ip(other))), "{other}");
        }
    }

    #[test]
    fn a_quota_exists_while_its_client_holds_something() {
        let quotas = ClientQuotas::new(ClientLimits { connections: 1, ..ClientLimits::default() });
        let quota = quotas.get(ip("192.0.2.1"));
        let permit = quota.connections.clone().try_acquire_owned().expect("one");
        assert_eq!(quotas.get(ip("192.0.2.1")).connections.available_permits(), 0);
        assert_eq!(quotas.get(ip("192.0.2.2")).connections.available_permits(), 1);
        drop((quota, permit));
        assert!(quotas.active().is_empty(), "an idle client has no entry");
        assert_eq!(quotas.get(ip("192.0.2.1")).connections.available_permits(), 1);
    }
}
