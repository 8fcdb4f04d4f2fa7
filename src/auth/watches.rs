//! The watches of open streams over their credentials.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    rpc::{caller::Caller, error::Error},
    types::error_chain::ErrorChain,
};

/// The interval in which the credentials of open streams are checked, with one statement for all
/// sessions and one for all personal access tokens. A revocation on another replica ends a stream
/// within this time.
///
/// Test: `a_stream_ends_with_its_session_on_any_replica`.
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// How long the check of the watched credentials may take.
///
/// Test: `a_check_of_sessions_that_hangs_is_repeated`.
const WATCH_TIMEOUT: Duration = Duration::from_secs(5);

/// The watched credentials, each with the number of its streams.
#[derive(Debug, Default)]
pub(super) struct Watches {
    streams: Mutex<HashMap<Caller, (CancellationToken, usize)>>,
    /// Asks for a check at once.
    pub(super) check_now: Notify,
}

/// The watch of one stream over its credential.
#[derive(Debug)]
pub(crate) struct CredentialWatch {
    caller: Caller,
    ended: CancellationToken,
    watches: Arc<Watches>,
}

impl CredentialWatch {
    /// Waits until the credential has ended, and returns the error for the stream.
    pub(crate) async fn ended(&self) -> Error {
        self.ended.cancelled().await;
        self.caller.credential.revoked_error()
    }
}

impl Drop for CredentialWatch {
    fn drop(&mut self) {
        let mut watched = self.watches.lock();
        if let Some((_, streams)) = watched.get_mut(&self.caller) {
            *streams -= 1;
            if *streams == 0 {
                watched.remove(&self.caller);
            }
        }
    }
}

impl Watches {
    pub(super) fn add(self: &Arc<Self>, caller: Caller) -> CredentialWatch {
        let mut watched = self.lock();
        let (ended, streams) = watched.entry(caller).or_default();
        *streams += 1;
        CredentialWatch { caller, ended: ended.clone(), watches: self.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Caller, (CancellationToken, usize)>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks the watched credentials every [`WATCH_INTERVAL`], and at once when asked to. Without
    /// watches, it looks up nothing. `lookup` returns whether each credential is active.
    pub(super) async fn check_until_dropped<F>(self: Arc<Self>, lookup: impl Fn(Vec<Caller>) -> F)
    where
        F: Future<Output = Result<Vec<bool>, Error>>,
    {
        loop {
            tokio::select! {
                () = sleep(WATCH_INTERVAL) => {}
                () = self.check_now.notified() => {}
            }
            let callers: Vec<_> = self.lock().keys().copied().collect();
            if callers.is_empty() {
                continue;
            }
            match timeout(WATCH_TIMEOUT, lookup(callers.clone())).await {
                Ok(Ok(active)) => self.end_inactive(&callers, &active),
                // The streams stay open: an unavailable database ends no credential.
                Ok(Err(error)) => {
                    tracing::debug!(error = %ErrorChain(&error), "failed to check credentials");
                }
                Err(error) => tracing::debug!(%error, "failed to check credentials"),
            }
        }
    }

    fn end_inactive(&self, callers: &[Caller], active: &[bool]) {
        let watched = self.lock();
        for (caller, is_active) in callers.iter().zip(active) {
            if !is_active && let Some((ended, _)) = watched.get(caller) {
                ended.cancel();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use tokio::time::Instant;

    use super::*;
    use crate::{
        rpc::caller::SessionCaller,
        types::id::{SessionId, UserId},
    };

    #[tokio::test(start_paused = true)]
    async fn a_check_of_sessions_that_hangs_is_repeated() {
        let watches = Arc::<Watches>::default();
        let caller = SessionCaller { user_id: UserId::any(), session_id: SessionId::any() };
        let watch = watches.add(caller.into());
        let lookups = AtomicUsize::new(0);
        let lookup = |callers: Vec<Caller>| {
            let hangs = lookups.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                if hangs {
                    pending::<()>().await;
                }
                Ok(vec![false; callers.len()])
            }
        };
        let started = Instant::now();
        let ended = timeout(Duration::from_mins(1), watch.ended());
        tokio::select! {
            () = watches.check_until_dropped(lookup) => {}
            ended = ended => {
                let error = ended.expect("the second check ends the session");
                assert!(matches!(error, Error::SessionRevoked), "{error}");
            }
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    }
}
