//! Stores the day on which a token was last used, in the background: no call waits for it, or
//! fails with it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use time::Date;
use tokio::{sync::Notify, time::sleep};
use tokio_util::task::AbortOnDropHandle;

use super::StoredToken;
use crate::{
    auth::store::AuthStore,
    rpc::error::Error,
    types::{
        error_chain::ErrorChain,
        id::{PersonalAccessTokenId, UserId},
    },
};

/// The maximum number of uses that wait to be stored, of 100 bytes each: at midnight all tokens
/// have one. A use beyond is skipped, and a later one of the same day is stored.
///
/// Test: `the_waiting_uses_are_bounded`.
const MAX_PENDING: usize = 10_000;

/// How long the next write waits after one that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Stores the last use of tokens, one after the other, because calls need the connections.
#[derive(Debug)]
pub(super) struct LastUseRecorder {
    pending: Arc<PendingUses>,
    _writer: AbortOnDropHandle<()>,
}

impl LastUseRecorder {
    /// Creates a recorder, which needs a runtime.
    pub(super) fn new(store: Arc<AuthStore>) -> Self {
        let pending = Arc::<PendingUses>::default();
        let writer = tokio::spawn(write(store, pending.clone()));
        Self { pending, _writer: AbortOnDropHandle::new(writer) }
    }

    /// Records a use of a token, unless its row has that day.
    pub(super) fn record(&self, token: &StoredToken, date: Date) {
        // The row is cached for seconds, and calls share it.
        if token.last_used_date < Some(date) && !token.is_use_recorded.swap(true, Ordering::Relaxed)
        {
            self.pending.add((token.user_id, token.id), date);
        }
    }
}

/// The uses that wait to be stored: the last one of each token.
#[derive(Debug, Default)]
struct PendingUses {
    dates: Mutex<HashMap<TokenKey, Date>>,
    added: Notify,
}

type TokenKey = (UserId, PersonalAccessTokenId);

impl PendingUses {
    fn add(&self, token: TokenKey, date: Date) {
        let mut dates = self.dates();
        if dates.len() < MAX_PENDING || dates.contains_key(&token) {
            dates.insert(token, date);
            self.added.notify_one();
        }
    }

    /// Adds one again, unless the token was used on another day in the meantime.
    fn put_back(&self, token: TokenKey, date: Date) {
        self.dates().entry(token).or_insert(date);
    }

    /// Removes one, once there is one.
    async fn next(&self) -> (TokenKey, Date) {
        loop {
            if let Some(next) = self.take() {
                return next;
            }
            self.added.notified().await;
        }
    }

    fn take(&self) -> Option<(TokenKey, Date)> {
        let mut dates = self.dates();
        let token = *dates.keys().next()?;
        dates.remove_entry(&token)
    }

    fn dates(&self) -> MutexGuard<'_, HashMap<TokenKey, Date>> {
        self.dates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn write(store: Arc<AuthStore>, pending: Arc<PendingUses>) {
    loop {
        let (token, date) = pending.next().await;
        let Err(error) = store.record_token_use(token.0, token.1, date).await else { continue };
        tracing::debug!(error = %ErrorChain(&error), "failed to store last use of token");
        // Another error concerns this token, which must not hold up the others. A later use of the
        // day is recorded again.
        if matches!(error, Error::DatabaseUnavailable(_)) {
            pending.put_back(token, date);
            sleep(RETRY_INTERVAL).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use time::macros::date;

    use super::*;

    #[tokio::test]
    async fn the_waiting_uses_are_bounded() {
        let (pending, today) = (PendingUses::default(), date!(2026 - 11 - 30));
        let token = || (UserId::any(), PersonalAccessTokenId::any());
        let first = token();
        pending.add(first, today);
        for _ in 0..2 * MAX_PENDING {
            pending.add(token(), today);
        }
        assert_eq!(pending.dates().len(), 10_000);
        pending.add(first, date!(2026 - 12 - 01));
        assert_eq!(pending.dates()[&first], date!(2026 - 12 - 01));
        for _ in 0..MAX_PENDING {
            pending.next().await;
        }
        assert!(pending.take().is_none());
    }
}
