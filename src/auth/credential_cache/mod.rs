//! The cache of sessions and personal access tokens, so that most calls need no lookup, and
//! concurrent calls with one credential share it, also if it fails.
//!
//! Ending a credential invalidates all entries of its user. The result of a lookup that began
//! before is not cached, so it never revives a credential.
//!
//! The cache remembers that a session has ended, but not that a personal access token does not
//! exist: an attacker can make up the IDs of tokens, which would push out others.

mod lookups;
#[cfg(test)]
mod tests;

use std::{cmp::Reverse, sync::Arc, time::Duration};

use quick_cache::{Weighter, sync::Cache};
use tokio::time::Instant;

use self::lookups::{Lookup, Lookups};
use super::personal_access_tokens::StoredToken;
use crate::{
    rpc::{
        caller::{Caller, Credential},
        error::Error,
    },
    telemetry::metrics::SessionCacheMetrics,
    types::id::UserId,
};

/// How long a cached credential counts as active without another lookup. A revocation on another
/// replica takes effect within this time.
///
/// Test: `another_replica_rejects_a_revoked_session_within_five_seconds`.
pub(crate) const CREDENTIAL_CACHE_TTL: Duration = Duration::from_secs(5);

/// Cached credentials of all users. By calculation, one takes about 200 bytes as a session and 400
/// as a token with all scopes, so 13 MiB at most.
///
/// Test: `the_cached_credentials_are_bounded`.
const MAX_CREDENTIALS: u64 = 32_768;

/// The number of users for which the cache is laid out.
const EXPECTED_USERS: usize = 10_000;

/// Cached credentials of one user: all tokens that a user has, and 16 sessions. More are rarely in
/// use within the same few seconds.
///
/// Test: `the_credentials_of_a_user_are_bounded`.
const MAX_CREDENTIALS_PER_USER: usize = 50 + 16;

/// The credentials that this process has looked up within the TTL.
#[derive(Debug)]
pub(super) struct CredentialCache {
    users: Cache<UserId, UserEntries, CredentialCount>,
    lookups: Arc<Lookups>,
    metrics: SessionCacheMetrics,
}

/// The credentials of a user, which are replaced together: the cache counts them when it gets them.
type UserEntries = Arc<[CacheEntry]>;

/// What the cache bounds.
#[derive(Clone, Debug)]
struct CredentialCount;

impl Weighter<UserId, UserEntries> for CredentialCount {
    fn weight(&self, _: &UserId, entries: &UserEntries) -> u64 {
        entries.len() as u64
    }
}

/// A credential that exists.
#[derive(Clone, Debug)]
pub(super) enum FoundCredential {
    /// An active session.
    Session {
        /// The time when it expires, unless it is refreshed before.
        active_until: Instant,
    },
    /// A personal access token, also if it has expired.
    PersonalAccessToken(Arc<StoredToken>),
}

#[derive(Clone, Debug)]
struct CacheEntry {
    credential: Credential,
    looked_up_at: Instant,
    found: Option<FoundCredential>,
}

impl CredentialCache {
    /// Creates an empty cache.
    #[must_use]
    pub(super) fn new(metrics: SessionCacheMetrics) -> Self {
        let users = Cache::with_weighter(EXPECTED_USERS, MAX_CREDENTIALS, CredentialCount);
        Self { users, lookups: Arc::default(), metrics }
    }

    /// Returns the number of users with cached credentials.
    #[must_use]
    pub(super) fn len(&self) -> usize {
        self.users.len()
    }

    /// Returns what is cached of a credential: `Some(None)` if it does not exist, and `None` if it
    /// needs a lookup.
    #[expect(clippy::option_option, reason = "a lookup, and whether it found something")]
    pub(super) fn get(&self, caller: Caller) -> Option<Option<FoundCredential>> {
        let entries = self.users.get(&caller.user_id)?;
        let entry = entries.iter().find(|entry| entry.credential == caller.credential)?;
        let found = entry.is_fresh().then(|| entry.found.clone())?;
        self.metrics.hits.inc();
        Some(found)
    }

    /// Returns a credential that exists, from the cache or from `lookup`.
    pub(super) async fn find(
        &self,
        caller: Caller,
        lookup: impl AsyncFnOnce() -> Result<Option<FoundCredential>, Error>,
    ) -> Result<Option<FoundCredential>, Error> {
        if let Some(found) = self.get(caller) {
            return Ok(found);
        }
        let shared = self.lookups.join(caller);
        let mut outcome = shared.outcome.lock().await;
        match &*outcome {
            Some(Ok(found)) => {
                self.metrics.hits.inc();
                return Ok(found.clone());
            }
            // One after another, the lookups of waiting calls would exceed their deadlines.
            Some(Err(error)) => return Err(error.duplicate()),
            None => {}
        }
        self.metrics.misses.inc();
        let looked_up_at = Instant::now();
        let result = lookup().await;
        *outcome = Some(match &result {
            Ok(found) => Ok(found.clone()),
            Err(error) => Err(error.duplicate()),
        });
        self.finish(&shared, looked_up_at, result.as_ref().ok());
        result
    }

    /// Ends a lookup for calls that come later, and caches its result.
    fn finish(
        &self,
        shared: &Arc<Lookup>,
        looked_up_at: Instant,
        found: Option<&Option<FoundCredential>>,
    ) {
        let caller = shared.caller;
        let mut lookups = self.lookups.lock();
        // An invalidation in the meantime has removed it.
        if lookups.get(&caller).is_none_or(|other| other.as_ptr() != Arc::as_ptr(shared)) {
            return;
        }
        lookups.remove(&caller);
        let Some(found) = found.cloned() else { return };
        if found.is_none() && matches!(caller.credential, Credential::PersonalAccessToken(_)) {
            return;
        }
        // While the lock is held, so that an invalidation comes before or removes the entry.
        let entry = CacheEntry { credential: caller.credential, looked_up_at, found };
        self.users.insert(caller.user_id, self.with_entry(caller.user_id, entry));
    }

    /// Returns the credentials of a user with this one, and without the oldest beyond the limit.
    fn with_entry(&self, user_id: UserId, entry: CacheEntry) -> UserEntries {
        let others = self.users.get(&user_id);
        let others = others.iter().flat_map(|entries| entries.iter());
        let is_kept =
            |other: &&CacheEntry| other.credential != entry.credential && other.is_fresh();
        let mut entries: Vec<_> = others.filter(is_kept).cloned().collect();
        if entries.len() >= MAX_CREDENTIALS_PER_USER {
            entries.sort_unstable_by_key(|entry| Reverse(entry.looked_up_at));
            entries.truncate(MAX_CREDENTIALS_PER_USER - 1);
        }
        entries.push(entry);
        entries.into()
    }

    /// Removes all credentials of a user, after one of them ended.
    pub(super) fn invalidate(&self, user_id: UserId) {
        let mut lookups = self.lookups.lock();
        lookups.retain(|caller, _| caller.user_id != user_id);
        self.users.remove(&user_id);
    }
}

impl CacheEntry {
    /// A session that has expired since the lookup may have been refreshed before.
    fn is_fresh(&self) -> bool {
        let now = Instant::now();
        let has_expired = matches!(
            self.found,
            Some(FoundCredential::Session { active_until }) if active_until <= now
        );
        now.duration_since(self.looked_up_at) < CREDENTIAL_CACHE_TTL && !has_expired
    }
}
