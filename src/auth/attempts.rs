//! How often somebody may fail to log in.
//!
//! Failures are counted three times: of an account from a peer, of a peer whatever the
//! account, and of an account wherever from. The first limit is low, so that guessing is
//! slow; the last one is high, because a stranger who reaches it locks the owner out.
//!
//! An account is counted by the name that a login gives, whether anybody has it or not, so
//! that a lock tells nothing; the two names of one user are counted apart. A peer is an
//! address, or an IPv6 network. The counts are in the memory of this process: each replica
//! has its own, and a start forgets them.
//!
//! Only failures stay in memory, and each has cost a hash: who wants to push counts out of
//! the table must fill it with as much work.

use std::{
    hash::{BuildHasher, RandomState},
    mem,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use indexmap::IndexMap;
use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};

use super::LoginName;
use crate::{audit, caller::Peer, error::Error, peers::network, types::id::UserId};

/// Of one account from one peer: more than an owner needs who tries all passwords that
/// come to mind, and too few for a guess. Later on, about a hundred a day.
const OF_ACCOUNT_AT_PEER: Rule = Rule {
    limit: 10,
    memory: Duration::from_hours(24),
    lock: Lock::Doubling { first: Duration::from_secs(1), cap: Duration::from_mins(15) },
};

/// Of one peer over all accounts: a house or an office may share an address, and rarely
/// has ten wrong passwords a minute.
const OF_PEER: Rule =
    Rule { limit: 100, memory: Duration::from_mins(10), lock: Lock::UntilForgotten };

/// Of one account over all peers: a stranger needs dozens of addresses to lock an owner out,
/// and an attacker with any number of them still guesses no faster.
const OF_ACCOUNT: Rule =
    Rule { limit: 1_000, memory: Duration::from_hours(1), lock: Lock::UntilForgotten };

/// Counts that are kept, some 90 bytes each and as much again that the table keeps spare,
/// so 12 MiB at the most.
const MAX_COUNTS: usize = 65_536;

/// Counts that are looked at to find one that may go for another: enough that a lock goes
/// only where nearly all are locks.
const LOOKED_AT: usize = 16;

/// Attempts that wait for others at once: a quarter of MAX_CONCURRENT_CALLS as it is by
/// default, so that they leave most places to other calls.
const MAX_WAITING: usize = 64;

/// When failures are too many, and what follows.
#[derive(Debug)]
struct Rule {
    /// Failures from which on there is a lock. Until then as many attempts may be under way
    /// as failures are left; from then on, one at a time.
    limit: u32,
    /// For how long failures count: see [`Lock`].
    memory: Duration,
    lock: Lock,
}

#[derive(Debug)]
enum Lock {
    /// Each failure locks twice as long as the one before. All are forgotten when there was
    /// none for the memory's time, or by a success.
    Doubling { first: Duration, cap: Duration },
    /// Until all are forgotten: when the first is as old as the memory's time.
    UntilForgotten,
}

/// Counts logins that fail, and refuses what comes too often.
#[derive(Debug)]
pub struct Attempts {
    counts: Mutex<Counts>,
    /// Told when an attempt ends where others wait.
    left: Notify,
    /// One permit for each attempt that may wait.
    waiting: Semaphore,
    /// Makes fingerprints of accounts that nobody can foresee.
    hasher: RandomState,
}

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    AccountAtPeer(Fingerprint, IpAddr),
    Peer(IpAddr),
    Account(Fingerprint),
}

/// Names an account without telling it, and in a few bytes.
type Fingerprint = u64;

impl Key {
    const fn rule(self) -> &'static Rule {
        match self {
            Self::AccountAtPeer(..) => &OF_ACCOUNT_AT_PEER,
            Self::Peer(_) => &OF_PEER,
            Self::Account(_) => &OF_ACCOUNT,
        }
    }
}

/// Whose password is tried.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) enum Account<'a> {
    /// Of whoever has this name, if anybody has.
    Named(&'a LoginName),
    /// Of a user who is logged in.
    Own(UserId),
}

impl Default for Attempts {
    fn default() -> Self {
        Self {
            counts: Mutex::default(),
            left: Notify::new(),
            waiting: Semaphore::new(MAX_WAITING),
            hasher: RandomState::new(),
        }
    }
}

impl Attempts {
    /// Begins an attempt; [`Error::TooManyAttempts`] while there is a lock. Waits where
    /// attempts under way would be too many if all of them failed, so that those that come
    /// at the same time get no further than those that come one by one; [`Error::Overloaded`]
    /// where too many wait.
    pub(super) async fn begin(
        self: &Arc<Self>,
        account: Account<'_>,
        peer: Peer,
    ) -> Result<Attempt, Error> {
        let keys = self.keys(account, peer);
        if let Some(attempt) = self.try_begin(keys)? {
            return Ok(attempt);
        }
        let _waiting = self.waiting.try_acquire().map_err(|_| Error::Overloaded)?;
        loop {
            // Before the look, so that none that ends after it is missed.
            let left = self.left.notified();
            if let Some(attempt) = self.try_begin(keys)? {
                return Ok(attempt);
            }
            left.await;
        }
    }

    /// Counts a failure by a name under which the attempt was not made; not of the peer,
    /// of which it is counted already.
    pub(super) fn add_failure(&self, account: Account<'_>, peer: Peer) {
        let [at_peer, of_account, _] = self.keys(account, peer);
        self.counts().fail([at_peer, of_account], Instant::now());
    }

    fn keys(&self, account: Account<'_>, Peer(ip): Peer) -> [Key; 3] {
        let (account, peer) = (self.hasher.hash_one(account), network(ip));
        [Key::AccountAtPeer(account, peer), Key::Account(account), Key::Peer(peer)]
    }

    /// `None` where it has to wait.
    fn try_begin(self: &Arc<Self>, keys: [Key; 3]) -> Result<Option<Attempt>, Error> {
        // The counts are free again before anything is logged.
        let entered = self.counts().enter(keys, Instant::now());
        match entered {
            Ok(let_in) => Ok(let_in.then(|| Attempt { attempts: self.clone(), keys })),
            Err(Locked { retry_after, is_first }) => {
                // All of them would flood the log.
                if is_first {
                    audit::record("login_refused", None, None);
                }
                Err(Error::TooManyAttempts { retry_after })
            }
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attempt under way. Dropped without a verdict it counts for nothing: no password was
/// looked at.
#[derive(Debug)]
pub(super) struct Attempt {
    attempts: Arc<Attempts>,
    keys: [Key; 3],
}

impl Attempt {
    /// The password was right. What strangers did meanwhile still counts against them.
    pub(super) fn succeed(self) {
        let [at_peer, ..] = self.keys;
        self.attempts.counts().of(at_peer, Instant::now()).forget();
    }

    /// The password was wrong. Whether that locks something.
    pub(super) fn fail(self) -> bool {
        self.attempts.counts().fail(self.keys, Instant::now())
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.attempts.counts().leave(self.keys) {
            self.attempts.left.notify_waiters();
        }
    }
}

/// The counts that are not zero.
#[derive(Debug, Default)]
struct Counts {
    table: IndexMap<Key, Count>,
    /// Where in the table to look next for a count that may go.
    hand: usize,
}

impl Counts {
    /// Lets an attempt in, to all of the counts or to none. Looks for a lock at the same
    /// moment: an attempt that fails between the two would not keep this one out.
    fn enter(&mut self, keys: [Key; 3], now: Instant) -> Result<bool, Locked> {
        self.refuse_if_locked(keys, now)?;
        let mut has_room = true;
        for key in keys {
            if let Some(count) = self.table.get_mut(&key)
                && !count.has_room(key.rule())
            {
                count.is_awaited = true;
                has_room = false;
            }
        }
        if has_room {
            for key in keys {
                self.of(key, now).under_way += 1;
            }
        }
        Ok(has_room)
    }

    /// The longest lock counts.
    fn refuse_if_locked(&mut self, keys: [Key; 3], now: Instant) -> Result<(), Locked> {
        let (mut longest, mut is_first) = (None, false);
        for key in keys {
            if let Some(count) = self.table.get_mut(&key)
                && let Some(rest) = count.locked_for(now)
            {
                longest = longest.max(Some(rest));
                is_first |= !mem::replace(&mut count.has_refused, true);
            }
        }
        longest.map_or(Ok(()), |retry_after| Err(Locked { retry_after, is_first }))
    }

    /// Counts a failure. Whether that makes a lock.
    fn fail<const N: usize>(&mut self, keys: [Key; N], now: Instant) -> bool {
        // All of them, not only until one locks.
        keys.map(|key| self.of(key, now).fail(key.rule(), now)).contains(&true)
    }

    /// Ends an attempt. Whether others may have waited for that.
    fn leave(&mut self, keys: [Key; 3]) -> bool {
        let mut was_awaited = false;
        for key in keys {
            let Some(count) = self.table.get_mut(&key) else {
                continue;
            };
            count.under_way -= 1;
            was_awaited |= mem::take(&mut count.is_awaited);
            if count.under_way == 0 && count.failures == 0 {
                self.table.swap_remove(&key);
            }
        }
        was_awaited
    }

    fn of(&mut self, key: Key, now: Instant) -> &mut Count {
        if !self.table.contains_key(&key) && self.table.len() >= MAX_COUNTS {
            self.make_room(now);
        }
        self.table.entry(key).or_default()
    }

    /// Forgets the count that matters least of a few.
    fn make_room(&mut self, now: Instant) {
        let from_hand = (self.hand..self.table.len()).chain(0..self.hand);
        let idle = from_hand.filter(|at| self.table[*at].under_way == 0).take(LOOKED_AT);
        if let Some(least) = idle.min_by_key(|at| self.table[*at].weight(now)) {
            self.table.swap_remove_index(least);
            self.hand = least + 1;
        }
    }
}

/// Nothing is let in.
struct Locked {
    retry_after: Duration,
    /// Whether the lock refuses somebody for the first time.
    is_first: bool,
}

/// What is known of a key.
#[derive(Debug, Default)]
struct Count {
    failures: u32,
    under_way: u32,
    /// Whether somebody waits for one of those under way to end.
    is_awaited: bool,
    /// Whether the lock has refused somebody.
    has_refused: bool,
    /// When the failures are forgotten; `None` if there are none.
    forget_at: Option<Instant>,
    locked_until: Option<Instant>,
}

impl Count {
    /// For how long nothing is let in.
    fn locked_for(&mut self, now: Instant) -> Option<Duration> {
        if self.forget_at.is_some_and(|forget_at| forget_at <= now) {
            self.forget();
        }
        let until = self.locked_until.filter(|until| *until > now)?;
        Some(until - now)
    }

    /// Whether one more may come in, if it and all that are under way may fail.
    fn has_room(&self, rule: &Rule) -> bool {
        self.under_way == 0 || self.failures.saturating_add(self.under_way) < rule.limit
    }

    /// Counts a failure. Whether that makes a lock.
    fn fail(&mut self, rule: &Rule, now: Instant) -> bool {
        self.locked_for(now);
        self.failures = self.failures.saturating_add(1);
        let forget_at = match (&rule.lock, self.forget_at) {
            (Lock::UntilForgotten, Some(forget_at)) => forget_at,
            _ => now + rule.memory,
        };
        self.forget_at = Some(forget_at);
        let Some(beyond) = self.failures.checked_sub(rule.limit) else {
            return false;
        };
        self.has_refused = false;
        self.locked_until = Some(match rule.lock {
            Lock::Doubling { first, cap } => {
                now + first.saturating_mul(2_u32.saturating_pow(beyond)).min(cap)
            }
            Lock::UntilForgotten => forget_at,
        });
        true
    }

    fn forget(&mut self) {
        let Self { under_way, is_awaited, .. } = *self;
        *self = Self { under_way, is_awaited, ..Self::default() };
    }

    /// How much it would matter if this were forgotten: locks most, then many failures.
    fn weight(&self, now: Instant) -> (bool, u32) {
        let is_good = |until: Option<Instant>| until.is_some_and(|until| until > now);
        (is_good(self.locked_until), if is_good(self.forget_at) { self.failures } else { 0 })
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    const PEER: &str = "192.0.2.1";

    fn attempts() -> Arc<Attempts> {
        Arc::new(Attempts::default())
    }

    fn peer(ip: &str) -> Peer {
        Peer(ip.parse().expect("an address"))
    }

    fn name(name: &str) -> LoginName {
        LoginName::parse(name)
    }

    async fn begin(attempts: &Arc<Attempts>, login: &str, ip: &str) -> Result<Attempt, Error> {
        attempts.begin(Account::Named(&name(login)), peer(ip)).await
    }

    /// Fails once; if that is refused, for how long.
    async fn fail(attempts: &Arc<Attempts>, login: &str, ip: &str) -> Option<Duration> {
        match begin(attempts, login, ip).await {
            Ok(attempt) => {
                attempt.fail();
                None
            }
            Err(Error::TooManyAttempts { retry_after }) => Some(retry_after),
            Err(error) => panic!("{error}"),
        }
    }

    /// Fails until that is refused: how often, and for how long it is.
    async fn fail_until_locked(attempts: &Arc<Attempts>, login: &str, ip: &str) -> (u32, Duration) {
        for failures in 0..10_000 {
            if let Some(retry_after) = fail(attempts, login, ip).await {
                return (failures, retry_after);
            }
        }
        panic!("never locked");
    }

    fn kept(attempts: &Attempts) -> usize {
        attempts.counts().table.len()
    }

    #[test]
    fn the_lock_doubles_up_to_its_cap_and_is_forgotten_after_a_day() {
        let (rule, mut now) = (&OF_ACCOUNT_AT_PEER, Instant::now());
        let mut count = Count::default();
        for failures in 1..10 {
            assert!(!count.fail(rule, now), "{failures}");
            assert_eq!(count.locked_for(now), None);
        }
        for seconds in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900] {
            assert!(count.fail(rule, now));
            let lock = Duration::from_secs(seconds);
            assert_eq!(count.locked_for(now), Some(lock));
            now += lock;
            assert_eq!(count.locked_for(now), None, "it ends");
        }
        now += Duration::from_mins(44);
        assert!(count.fail(rule, now), "all still count");
        now += rule.memory;
        assert!(!count.fail(rule, now), "forgotten");
        assert_eq!(count.failures, 1);
        for _ in 0..100 {
            count.fail(rule, now);
        }
        assert_eq!(count.locked_for(now), Some(Duration::from_mins(15)), "no overflow");
    }

    #[test]
    fn a_window_begins_with_its_first_failure_and_locks_until_its_end() {
        let (rule, mut now) = (&OF_PEER, Instant::now());
        let mut count = Count::default();
        for _ in 1..rule.limit {
            assert!(!count.fail(rule, now));
            now += Duration::from_secs(1);
        }
        assert!(count.fail(rule, now));
        let rest = Duration::from_secs(10 * 60 - 99);
        assert_eq!(count.locked_for(now), Some(rest));
        now += rest;
        assert_eq!(count.locked_for(now), None);
        assert!(!count.fail(rule, now), "a new window");
        assert_eq!(count.locked_for(now), None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_account_is_locked_for_the_peer_that_failed_alone() {
        let attempts = attempts();
        assert_eq!(
            fail_until_locked(&attempts, "ana", PEER).await,
            (10, Duration::from_secs(1)),
            "known or not: nobody is asked"
        );
        assert_eq!(fail(&attempts, " ANA ", PEER).await, Some(Duration::from_secs(1)));
        assert_eq!(fail(&attempts, "ana", "192.0.2.2").await, None);
        assert_eq!(fail(&attempts, "bob", PEER).await, None);
        // In the same IPv6 network.
        fail_until_locked(&attempts, "ana", "2001:db8::1").await;
        assert!(fail(&attempts, "ana", "2001:db8::2").await.is_some());
        assert_eq!(fail(&attempts, "ana", "2001:db8:0:1::1").await, None);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(fail(&attempts, "ana", PEER).await, None, "the lock has ended");
        assert_eq!(fail(&attempts, "ana", PEER).await, Some(Duration::from_secs(2)));
    }

    #[tokio::test]
    async fn a_success_resets_the_account_at_the_peer_but_not_the_peer() {
        let attempts = attempts();
        for _ in 0..11 {
            for _ in 0..9 {
                assert_eq!(fail(&attempts, "ana", PEER).await, None);
            }
            begin(&attempts, "ana", PEER).await.expect("let in").succeed();
        }
        assert_eq!(fail(&attempts, "ana", PEER).await, None, "the hundredth");
        assert!(fail(&attempts, "bob", PEER).await.is_some());
        assert_eq!(fail(&attempts, "bob", "192.0.2.2").await, None);
    }

    #[tokio::test]
    async fn an_account_is_locked_for_all_after_very_many_failures_only() {
        let attempts = attempts();
        let (mut failures, mut next) = (0, 0_u32);
        let locked = loop {
            let ip = format!("198.18.{}.{}", next / 250, next % 250);
            next += 1;
            let (some, retry_after) = fail_until_locked(&attempts, "ana", &ip).await;
            failures += some;
            if some == 0 {
                break retry_after;
            }
        };
        assert_eq!(failures, OF_ACCOUNT.limit);
        assert!(locked > Duration::from_mins(59), "{locked:?}");
        assert_eq!(fail(&attempts, "bob", "198.18.0.1").await, None);
    }

    #[tokio::test]
    async fn a_peer_that_is_locked_out_leaves_no_counts_behind() {
        let attempts = attempts();
        for number in 0..OF_PEER.limit {
            assert_eq!(fail(&attempts, &number.to_string(), PEER).await, None);
        }
        let before = kept(&attempts);
        for number in 0..1_000 {
            assert!(fail(&attempts, &format!("other{number}"), PEER).await.is_some());
        }
        assert_eq!(kept(&attempts), before);
    }

    #[tokio::test]
    async fn attempts_at_once_get_no_further_than_one_by_one() {
        let attempts = attempts();
        let mut guesses: JoinSet<_> = (0..1_000)
            .map(|_| {
                let attempts = attempts.clone();
                async move {
                    let attempt = begin(&attempts, "ana", PEER).await?;
                    tokio::task::yield_now().await;
                    attempt.fail();
                    Ok::<_, Error>(())
                }
            })
            .collect();
        let (mut failed, mut refused) = (0, 0);
        while let Some(guess) = guesses.join_next().await {
            match guess.expect("no panic") {
                Ok(()) => failed += 1,
                Err(Error::TooManyAttempts { .. }) => refused += 1,
                Err(error) => assert!(matches!(error, Error::Overloaded), "{error}"),
            }
        }
        assert_eq!((failed, refused), (OF_ACCOUNT_AT_PEER.limit, MAX_WAITING), "no other waits");
    }

    #[tokio::test]
    async fn of_right_passwords_at_once_so_many_wait_and_are_let_in_each_in_its_turn() {
        let attempts = attempts();
        for _ in 0..9 {
            assert_eq!(fail(&attempts, "ana", PEER).await, None);
        }
        let mut logins: JoinSet<_> = (0..1_000)
            .map(|_| {
                let attempts = attempts.clone();
                async move {
                    let attempt = begin(&attempts, "ana", PEER).await?;
                    tokio::task::yield_now().await;
                    attempt.succeed();
                    // As many may be under way again: it is as before.
                    for _ in 0..9 {
                        attempts.add_failure(Account::Named(&name("ana")), peer(PEER));
                    }
                    Ok::<_, Error>(())
                }
            })
            .collect();
        let (mut let_in, mut shed) = (0, 0);
        while let Some(login) = logins.join_next().await {
            match login.expect("no panic") {
                Ok(()) => let_in += 1,
                Err(Error::Overloaded) => shed += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!((let_in, shed), (1 + MAX_WAITING, 999 - MAX_WAITING));
    }

    #[tokio::test]
    async fn what_is_given_up_counts_for_nothing_and_lets_others_in() {
        let attempts = attempts();
        for number in 0..1_000 {
            drop(begin(&attempts, "ana", PEER).await.expect("let in"));
            drop(begin(&attempts, &number.to_string(), PEER).await.expect("let in"));
        }
        assert_eq!(kept(&attempts), 0);
        let mut held = Vec::new();
        for _ in 0..10 {
            held.push(begin(&attempts, "ana", PEER).await.expect("let in"));
        }
        let ana = name("ana");
        let mut eleventh = Box::pin(attempts.begin(Account::Named(&ana), peer(PEER)));
        let waits = tokio::select! {
            biased;
            _ = &mut eleventh => false,
            () = tokio::task::yield_now() => true,
        };
        assert!(waits);
        held.pop();
        drop(eleventh.await.expect("let in"));
    }

    #[tokio::test]
    async fn a_failure_counts_by_other_names_as_well() {
        let (attempts, user_id) = (attempts(), UserId::generate());
        for _ in 0..10 {
            let attempt = attempts.begin(Account::Own(user_id), peer(PEER)).await;
            attempt.expect("let in").fail();
            attempts.add_failure(Account::Named(&name("ana")), peer(PEER));
        }
        assert!(attempts.begin(Account::Own(user_id), peer(PEER)).await.is_err());
        assert!(fail(&attempts, "ana", PEER).await.is_some());
        assert_eq!(fail(&attempts, "ana", "192.0.2.2").await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_is_bounded_and_locks_are_kept_longest() {
        let attempts = attempts();
        let failures = fail_until_locked(&attempts, "ana", PEER).await.0;
        for _ in 1..failures {
            assert_eq!(fail(&attempts, "bob", PEER).await, None);
        }
        let held = begin(&attempts, "eva", PEER).await.expect("let in");
        for _ in 0..2 * MAX_COUNTS {
            attempts.add_failure(Account::Own(UserId::generate()), peer(PEER));
        }
        assert_eq!(kept(&attempts), MAX_COUNTS);
        assert!(fail(&attempts, "ana", PEER).await.is_some(), "a lock");
        assert_eq!(fail(&attempts, "bob", PEER).await, None);
        assert!(fail(&attempts, "bob", PEER).await.is_some(), "a count that is nearly one");
        held.fail();
        let at_peer = attempts.keys(Account::Named(&name("eva")), peer(PEER))[0];
        assert_eq!(attempts.counts().table[&at_peer].failures, 1, "what is under way");
    }

    #[test]
    fn where_all_are_locks_one_goes() {
        let (mut counts, now) = (Counts::default(), Instant::now());
        for account in 0..2 * MAX_COUNTS as u64 {
            let count = counts.of(Key::Account(account), now);
            count.failures = OF_ACCOUNT.limit - 1;
            assert!(count.fail(&OF_ACCOUNT, now), "a lock");
        }
        assert_eq!(counts.table.len(), MAX_COUNTS);
    }
}
