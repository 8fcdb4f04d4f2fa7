//! The records of failures, such as wrong passwords and unknown tokens, and the lockouts that
//! follow from them.

use std::{hash::Hash, mem, time::Duration};

use indexmap::IndexMap;
use tokio::time::Instant;

/// The maximum number of records. One takes about 90 bytes, and as much again for the spare
/// capacity of the table, so 12 MiB at most.
///
/// Test: `records_are_bounded_and_lockouts_are_evicted_last`.
pub(super) const MAX_RECORDS: usize = 65_536;

/// Records that are compared to evict one: enough that a lockout is evicted only if nearly all
/// records are lockouts.
///
/// Test: `records_are_bounded_and_lockouts_are_evicted_last`.
const EVICTION_SAMPLE: usize = 16;

/// What an operator may do about a client with failures that is no trusted proxy.
pub(super) const TRUST_PROXY_HINT: &str = "if the address is a proxy's, name it in TRUSTED_PROXIES";

/// When failures cause a lockout, and for how long.
#[derive(Debug)]
pub(super) struct LockoutPolicy {
    /// The number of failures that causes a lockout. Until then, as many attempts may be in
    /// flight as failures are left; from then on, one at a time.
    pub(super) max_failures: u32,
    /// How long failures count. See [`Lockout`] for when the window starts.
    pub(super) window: Duration,
    pub(super) lockout: Lockout,
}

/// The duration of a lockout.
#[derive(Debug)]
pub(super) enum Lockout {
    /// Each further failure locks out for twice as long. A success clears the failures, and so
    /// does a window without a failure.
    ExponentialBackoff { initial: Duration, max: Duration },
    /// The lockout ends with the window, which starts with the first failure.
    UntilWindowEnds,
}

/// An attempt that a lockout rejects.
pub(super) struct Rejected {
    /// The time until the lockout ends.
    pub(super) retry_after: Duration,
    /// Whether this is the first attempt that the lockout rejects.
    pub(super) is_first: bool,
}

/// What failures are counted for.
pub(super) trait FailureKey: Copy + Eq + Hash {
    /// Returns the policy that applies.
    fn policy(self) -> &'static LockoutPolicy;
}

/// The records of keys with failures or attempts in flight.
#[derive(Debug)]
pub(super) struct FailureTable<K> {
    pub(super) records: IndexMap<K, FailureRecord>,
    /// The index at which the next eviction starts.
    eviction_cursor: usize,
}

impl<K> Default for FailureTable<K> {
    fn default() -> Self {
        Self { records: IndexMap::new(), eviction_cursor: 0 }
    }
}

impl<K: FailureKey> FailureTable<K> {
    /// Admits an attempt for all of the keys or none. Returns `false` if it has to wait.
    ///
    /// The check and the admission are one step: an attempt that failed in between would not
    /// keep this one out.
    pub(super) fn try_admit<const N: usize>(
        &mut self,
        keys: [K; N],
        now: Instant,
    ) -> Result<bool, Rejected> {
        self.reject_if_locked(keys, now)?;
        let mut has_capacity = true;
        for key in keys {
            if let Some(record) = self.records.get_mut(&key)
                && !record.has_capacity(key.policy())
            {
                record.has_waiters = true;
                has_capacity = false;
            }
        }
        if has_capacity {
            for key in keys {
                self.entry(key, now).in_flight += 1;
            }
        }
        Ok(has_capacity)
    }

    /// Reports the longest of the lockouts.
    fn reject_if_locked<const N: usize>(
        &mut self,
        keys: [K; N],
        now: Instant,
    ) -> Result<(), Rejected> {
        let (mut longest, mut is_first) = (None, false);
        for key in keys {
            if let Some(record) = self.records.get_mut(&key)
                && let Some(rest) = record.locked_for(now)
            {
                longest = longest.max(Some(rest));
                is_first |= !mem::replace(&mut record.rejection_logged, true);
            }
        }
        longest.map_or(Ok(()), |retry_after| Err(Rejected { retry_after, is_first }))
    }

    /// Records a failure for each key. Returns `true` if that causes a lockout.
    pub(super) fn record_failure<const N: usize>(&mut self, keys: [K; N], now: Instant) -> bool {
        // All keys count, also after one that locks.
        keys.map(|key| self.entry(key, now).record_failure(key.policy(), now)).contains(&true)
    }

    /// Clears the failures and lockouts of the keys.
    pub(super) fn clear<const N: usize>(&mut self, keys: [K; N]) {
        for key in keys {
            if let Some(record) = self.records.get_mut(&key) {
                record.clear();
            }
        }
    }

    /// Ends an attempt. Returns `true` if others may wait for that.
    pub(super) fn release<const N: usize>(&mut self, keys: [K; N]) -> bool {
        let mut had_waiters = false;
        for key in keys {
            let Some(record) = self.records.get_mut(&key) else {
                continue;
            };
            record.in_flight -= 1;
            had_waiters |= mem::take(&mut record.has_waiters);
            if record.in_flight == 0 && record.failures == 0 {
                self.records.swap_remove(&key);
            }
        }
        had_waiters
    }

    /// Returns the record of a key, and creates it if there is none.
    pub(super) fn entry(&mut self, key: K, now: Instant) -> &mut FailureRecord {
        if !self.records.contains_key(&key) && self.records.len() >= MAX_RECORDS {
            self.evict_one(now);
        }
        self.records.entry(key).or_default()
    }

    /// Evicts the least important record of a sample.
    fn evict_one(&mut self, now: Instant) {
        let from_cursor = (self.eviction_cursor..self.records.len()).chain(0..self.eviction_cursor);
        let idle = from_cursor.filter(|index| self.records[*index].in_flight == 0);
        let sample = idle.take(EVICTION_SAMPLE);
        if let Some(least) = sample.min_by_key(|index| self.records[*index].eviction_weight(now)) {
            self.records.swap_remove_index(least);
            self.eviction_cursor = least + 1;
        }
    }
}

/// The failures and attempts of a key.
#[derive(Debug, Default)]
pub(super) struct FailureRecord {
    pub(super) failures: u32,
    in_flight: u32,
    /// Whether attempts wait for one of those in flight to end.
    has_waiters: bool,
    /// Whether the lockout has rejected an attempt already.
    rejection_logged: bool,
    /// The time when the failures stop counting; `None` if there are none.
    expires_at: Option<Instant>,
    locked_until: Option<Instant>,
}

impl FailureRecord {
    /// Returns the time until the lockout ends, if there is one.
    pub(super) fn locked_for(&mut self, now: Instant) -> Option<Duration> {
        if self.expires_at.is_some_and(|expires_at| expires_at <= now) {
            self.clear();
        }
        let until = self.locked_until.filter(|until| *until > now)?;
        Some(until - now)
    }

    /// Returns `true` if one more attempt is allowed, should all in flight fail.
    fn has_capacity(&self, policy: &LockoutPolicy) -> bool {
        self.in_flight == 0 || self.failures.saturating_add(self.in_flight) < policy.max_failures
    }

    /// Records a failure. Returns `true` if that causes a lockout.
    pub(super) fn record_failure(&mut self, policy: &LockoutPolicy, now: Instant) -> bool {
        self.locked_for(now);
        self.failures = self.failures.saturating_add(1);
        let expires_at = match (&policy.lockout, self.expires_at) {
            (Lockout::UntilWindowEnds, Some(expires_at)) => expires_at,
            _ => now + policy.window,
        };
        self.expires_at = Some(expires_at);
        let Some(beyond) = self.failures.checked_sub(policy.max_failures) else {
            return false;
        };
        self.rejection_logged = false;
        self.locked_until = Some(match policy.lockout {
            Lockout::ExponentialBackoff { initial, max } => {
                now + initial.saturating_mul(2_u32.saturating_pow(beyond)).min(max)
            }
            Lockout::UntilWindowEnds => expires_at,
        });
        true
    }

    /// Clears the failures and the lockout.
    pub(super) fn clear(&mut self) {
        let Self { in_flight, has_waiters, .. } = *self;
        *self = Self { in_flight, has_waiters, ..Self::default() };
    }

    /// Orders records by importance: lockouts last, then by their failures.
    fn eviction_weight(&self, now: Instant) -> (bool, u32) {
        let is_future = |until: Option<Instant>| until.is_some_and(|until| until > now);
        let failures = if is_future(self.expires_at) { self.failures } else { 0 };
        (is_future(self.locked_until), failures)
    }
}
