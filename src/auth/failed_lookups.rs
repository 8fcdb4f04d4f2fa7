//! Limits how many lookups of random credentials fail for one client.
//!
//! No attacker guesses 256 bits, so the limit saves the database work and nothing more: it never
//! rejects a valid credential, and locks no account. A client is an IPv4 address or an IPv6 /64.
//! Each replica counts separately, and a restart clears the counts.

use std::{
    array,
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::failures::{FailureKey, FailureTable, Lockout, LockoutPolicy, TRUST_PROXY_HINT};
use crate::{
    limits::client_quota::client_key,
    rpc::{caller::ClientIp, error::Error},
};

/// The policy for one client: a service with an old credential retries less often, and services
/// may share an address.
///
/// Test: `a_client_has_a_hundred_failed_lookups_within_ten_minutes`.
const PER_CLIENT: LockoutPolicy = LockoutPolicy {
    max_failures: 100,
    window: Duration::from_mins(10),
    lockout: Lockout::UntilWindowEnds,
};

/// The queues of clients with too many failures. Clients that share one also share its permits.
const QUEUES: usize = 64;

/// The lookups of a queue at a time: enough that valid credentials of the client come through
/// behind invalid ones, and few of the statements that a database can run.
///
/// Test: `a_client_over_the_limit_has_a_few_lookups_at_a_time`.
const LOOKUPS_PER_QUEUE: usize = 8;

/// The failed lookups of clients.
#[derive(Debug)]
pub(crate) struct FailedLookups {
    table: Mutex<FailureTable<ClientKey>>,
    queues: [Arc<Semaphore>; QUEUES],
    /// Assigns clients to queues with a random key, so that no client can choose a queue.
    hasher: RandomState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ClientKey(IpAddr);

impl ClientKey {
    fn new(ClientIp { ip, .. }: ClientIp) -> Self {
        Self(client_key(ip))
    }
}

impl FailureKey for ClientKey {
    fn policy(self) -> &'static LockoutPolicy {
        &PER_CLIENT
    }
}

impl Default for FailedLookups {
    fn default() -> Self {
        Self {
            table: Mutex::default(),
            queues: array::from_fn(|_| Arc::new(Semaphore::new(LOOKUPS_PER_QUEUE))),
            hasher: RandomState::new(),
        }
    }
}

impl FailedLookups {
    /// Returns how long the client is over the limit, or `None` if it is not.
    fn over_limit(&self, client_ip: ClientIp) -> Option<Duration> {
        self.table().over_limit(ClientKey::new(client_ip), Instant::now())
    }

    /// Waits until the client may look up a credential: at once below the limit, and otherwise a
    /// few at a time. The caller holds the permit until it has recorded a failure.
    pub(crate) async fn admit(&self, client_ip: ClientIp) -> Option<OwnedSemaphorePermit> {
        self.over_limit(client_ip)?;
        let key = self.hasher.hash_one(ClientKey::new(client_ip));
        let queue = usize::try_from(key % QUEUES as u64).unwrap_or_default();
        // No semaphore is ever closed.
        self.queues[queue].clone().acquire_owned().await.ok()
    }

    /// Records that a credential does not exist. Returns the error for the client: the one for a
    /// client that was over the limit before, or otherwise `invalid`.
    pub(crate) fn record(&self, client_ip: ClientIp, invalid: Error) -> Error {
        let (key, now) = (ClientKey::new(client_ip), Instant::now());
        let mut table = self.table();
        let over_limit = table.over_limit(key, now);
        let reaches_limit = table.record_failure([key], now);
        drop(table);
        if let Some(retry_after) = over_limit {
            return Error::TooManyAttempts { retry_after };
        }
        if reaches_limit {
            warn_of(client_ip);
        }
        invalid
    }

    fn table(&self) -> MutexGuard<'_, FailureTable<ClientKey>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reports a client that reaches the limit, once in a window.
fn warn_of(client_ip: ClientIp) {
    // To trust an address that a trusted proxy reports would let the client forge addresses.
    if client_ip.via_trusted_proxy {
        tracing::warn!("too many invalid tokens or reset codes");
    } else {
        tracing::warn!(hint = TRUST_PROXY_HINT, "too many invalid tokens or reset codes");
    }
}

impl FailureTable<ClientKey> {
    fn over_limit(&mut self, key: ClientKey, now: Instant) -> Option<Duration> {
        self.records.get_mut(&key)?.locked_for(now)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, timeout};

    use super::{super::failures::MAX_RECORDS, *};

    fn client(ip: &str) -> ClientIp {
        ClientIp { ip: ip.parse().expect("an address"), via_trusted_proxy: false }
    }

    /// Records a failure. Returns how long the client is over the limit, if it was before.
    fn fail(lookups: &FailedLookups, client: ClientIp) -> Option<Duration> {
        match lookups.record(client, Error::TokenInvalid) {
            Error::TooManyAttempts { retry_after } => Some(retry_after),
            _ => None,
        }
    }

    /// Records failures until the client was over the limit before. Returns their number.
    fn fail_until_over_limit(lookups: &FailedLookups, client: ClientIp) -> usize {
        (1..1_000).find(|_| fail(lookups, client).is_some()).expect("a limit")
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_has_a_hundred_failed_lookups_within_ten_minutes() {
        let (lookups, ana, bob) =
            (FailedLookups::default(), client("10.0.0.1"), client("10.0.0.2"));
        assert_eq!(fail_until_over_limit(&lookups, ana), 101);
        assert_eq!(lookups.over_limit(ana), Some(Duration::from_mins(10)));
        assert_eq!(lookups.over_limit(bob), None);
        advance(Duration::from_mins(4)).await;
        assert_eq!(fail(&lookups, ana), Some(Duration::from_mins(6)));
        advance(Duration::from_mins(6)).await;
        assert_eq!(lookups.over_limit(ana), None);
        assert_eq!(fail_until_over_limit(&lookups, ana), 101);
    }

    #[test]
    fn the_addresses_of_an_ipv6_network_are_one_client() {
        let lookups = FailedLookups::default();
        fail_until_over_limit(&lookups, client("2001:db8:0:1::1"));
        assert!(lookups.over_limit(client("2001:db8:0:1:ffff::2")).is_some());
        assert!(lookups.over_limit(client("2001:db8:0:2::1")).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_over_the_limit_has_a_few_lookups_at_a_time() {
        let (lookups, client) = (FailedLookups::default(), client("10.0.0.1"));
        assert!(lookups.admit(client).await.is_none(), "no permit is needed");
        fail_until_over_limit(&lookups, client);
        let mut permits = Vec::new();
        for _ in 0..8 {
            permits.push(lookups.admit(client).await.expect("a permit"));
        }
        assert!(timeout(Duration::from_secs(1), lookups.admit(client)).await.is_err());
        permits.pop();
        assert!(lookups.admit(client).await.is_some());
    }

    #[test]
    fn the_records_of_failed_lookups_are_bounded() {
        let lookups = FailedLookups::default();
        for number in 0..u32::try_from(2 * MAX_RECORDS).expect("a small number") {
            fail(&lookups, ClientIp { ip: IpAddr::V4(number.into()), via_trusted_proxy: true });
        }
        assert!(lookups.table().records.len() <= MAX_RECORDS);
    }
}
