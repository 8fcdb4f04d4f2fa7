//! Brute-force protection: throttles and locks out failed login attempts.
//!
//! Failures count three times: per account and client, per client over all accounts, and per
//! account over all clients. The first limit is low and slows down guessing. The last is high,
//! because an attacker who reaches it locks out the owner.
//!
//! The throttle identifies an account by the login of the request, whether it exists or not,
//! so that a lockout reveals nothing; the username and the email of a user count separately. A
//! client is an IPv4 address or an IPv6 /64. The counts live in the memory of the process: each
//! replica has its own, and a restart clears them.
//!
//! Only failures stay in memory, and each has cost a hash: an attacker who wants to evict
//! records must do as much work.

#[cfg(test)]
mod tests;

use std::{
    hash::{BuildHasher, RandomState},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};

use super::failures::{
    FailureKey, FailureTable, Lockout, LockoutPolicy, Rejected, TRUST_PROXY_HINT,
};
use crate::{
    limits::client_quota::client_key,
    rpc::{caller::ClientIp, error::Error},
    telemetry::audit,
    types::{id::UserId, login::LoginIdentifier},
};

/// The policy for one account and one client: more than an owner needs to try all passwords
/// that come to mind, and too few for guessing; after the first ten, about a hundred a day.
///
/// Test: `the_lockout_doubles_up_to_its_maximum_and_failures_expire_after_a_day`.
const PER_ACCOUNT_AND_CLIENT: LockoutPolicy = LockoutPolicy {
    max_failures: 10,
    window: Duration::from_hours(24),
    lockout: Lockout::ExponentialBackoff {
        initial: Duration::from_secs(1),
        max: Duration::from_mins(15),
    },
};

/// The policy for one client and all accounts: the users of a household or an office may share
/// an address, and rarely mistype ten passwords a minute.
///
/// Test: `a_window_starts_with_the_first_failure_and_locks_out_until_it_ends`.
const PER_CLIENT: LockoutPolicy = LockoutPolicy {
    max_failures: 100,
    window: Duration::from_mins(10),
    lockout: Lockout::UntilWindowEnds,
};

/// The policy for one account and all clients: an attacker needs dozens of addresses to lock
/// out the owner, and guesses no faster with any number of them.
///
/// Test: `an_account_is_locked_for_all_clients_after_a_thousand_failures`.
const PER_ACCOUNT: LockoutPolicy = LockoutPolicy {
    max_failures: 1_000,
    window: Duration::from_hours(1),
    lockout: Lockout::UntilWindowEnds,
};

/// Attempts that wait for others at once: a quarter of the default of `MAX_CONCURRENT_CALLS`,
/// so that most call permits stay with other calls.
///
/// Test: `concurrent_attempts_get_no_further_than_sequential_ones`.
const MAX_WAITING_LOGINS: usize = 64;

/// Counts failed login attempts, and rejects attempts beyond the limits.
#[derive(Debug)]
pub(crate) struct LoginThrottle {
    table: Mutex<FailureTable<ThrottleKey>>,
    /// Notified when an attempt ends that others wait for.
    attempt_ended: Notify,
    /// One permit for each attempt that may wait.
    waiting: Semaphore,
    /// Hashes accounts with a random key, so that no client can predict collisions.
    hasher: RandomState,
}

/// What failures are counted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ThrottleKey {
    AccountAndClient(AccountHash, IpAddr),
    Client(IpAddr),
    Account(AccountHash),
}

/// An account in a few bytes, which do not reveal the login.
type AccountHash = u64;

impl FailureKey for ThrottleKey {
    fn policy(self) -> &'static LockoutPolicy {
        match self {
            Self::AccountAndClient(..) => &PER_ACCOUNT_AND_CLIENT,
            Self::Client(_) => &PER_CLIENT,
            Self::Account(_) => &PER_ACCOUNT,
        }
    }
}

/// The account whose password is checked.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) enum Account<'a> {
    /// The account with this login, if there is one.
    Login(&'a LoginIdentifier),
    /// An authenticated user.
    User(UserId),
}

impl Default for LoginThrottle {
    fn default() -> Self {
        Self {
            table: Mutex::default(),
            attempt_ended: Notify::new(),
            waiting: Semaphore::new(MAX_WAITING_LOGINS),
            hasher: RandomState::new(),
        }
    }
}

impl LoginThrottle {
    /// Admits an attempt.
    ///
    /// Waits while the attempts in flight would exceed a limit if all of them failed, so that
    /// concurrent attempts get no further than sequential ones.
    ///
    /// # Errors
    /// [`Error::TooManyAttempts`] during a lockout, [`Error::Overloaded`] if too many attempts
    /// wait.
    pub(super) async fn admit(
        self: &Arc<Self>,
        account: Account<'_>,
        client_ip: ClientIp,
    ) -> Result<LoginAttempt, Error> {
        let keys = self.keys(account, client_ip);
        if let Some(attempt) = self.try_admit(keys, client_ip)? {
            return Ok(attempt);
        }
        let _waiting = self.waiting.try_acquire().map_err(|_| Error::Overloaded)?;
        loop {
            // Before the check, so that no attempt that ends after it is missed.
            let attempt_ended = self.attempt_ended.notified();
            if let Some(attempt) = self.try_admit(keys, client_ip)? {
                return Ok(attempt);
            }
            attempt_ended.await;
        }
    }

    /// Records a failure for a login that the attempt did not use. The client is not counted
    /// again.
    pub(super) fn record_failure_for(&self, account: Account<'_>, client_ip: ClientIp) {
        let [at_client, account, _] = self.keys(account, client_ip);
        self.table().record_failure([at_client, account], Instant::now());
    }

    /// Clears the failures of an account at this client, and those over all clients. Failures of the
    /// client over all accounts still count.
    pub(super) fn clear(&self, account: Account<'_>, client_ip: ClientIp) {
        let [at_client, account, _] = self.keys(account, client_ip);
        self.table().clear([at_client, account]);
    }

    fn keys(&self, account: Account<'_>, ClientIp { ip, .. }: ClientIp) -> [ThrottleKey; 3] {
        let (account, client) = (self.hasher.hash_one(account), client_key(ip));
        [
            ThrottleKey::AccountAndClient(account, client),
            ThrottleKey::Account(account),
            ThrottleKey::Client(client),
        ]
    }

    /// Returns `None` if the attempt has to wait.
    fn try_admit(
        self: &Arc<Self>,
        keys: [ThrottleKey; 3],
        client_ip: ClientIp,
    ) -> Result<Option<LoginAttempt>, Error> {
        // The lock is released before anything is logged.
        let admitted = self.table().try_admit(keys, Instant::now());
        match admitted {
            Ok(admitted) => {
                Ok(admitted.then(|| LoginAttempt { throttle: self.clone(), keys, client_ip }))
            }
            Err(Rejected { retry_after, is_first }) => {
                // One line for each lockout: a line for each attempt would flood the log.
                if is_first {
                    audit::record("login_refused", None, None);
                }
                Err(Error::TooManyAttempts { retry_after })
            }
        }
    }

    fn table(&self) -> MutexGuard<'_, FailureTable<ThrottleKey>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An admitted login attempt. Dropping it without recording an outcome releases its slot and
/// records no failure, because no password was checked.
#[derive(Debug)]
pub(super) struct LoginAttempt {
    throttle: Arc<LoginThrottle>,
    keys: [ThrottleKey; 3],
    client_ip: ClientIp,
}

impl LoginAttempt {
    /// Records that the password matched: clears the failures of the account at this client.
    /// Failures of other clients still count against them.
    pub(super) fn record_success(self) {
        let [at_client, ..] = self.keys;
        self.throttle.table().entry(at_client, Instant::now()).clear();
    }

    /// Records that the password did not match. Returns `true` if that causes a lockout.
    pub(super) fn record_failure(self) -> bool {
        let now = Instant::now();
        let [.., client] = self.keys;
        let (locks, locks_client) = {
            let mut table = self.throttle.table();
            let locks = table.record_failure(self.keys, now);
            (locks, locks && table.entry(client, now).locked_for(now).is_some())
        };
        // To trust an address that a trusted proxy reports would let the client forge addresses.
        if locks_client && !self.client_ip.via_trusted_proxy {
            tracing::warn!(hint = TRUST_PROXY_HINT, "client locked out");
        }
        locks
    }
}

impl Drop for LoginAttempt {
    fn drop(&mut self) {
        if self.throttle.table().release(self.keys) {
            self.throttle.attempt_ended.notify_waiters();
        }
    }
}
