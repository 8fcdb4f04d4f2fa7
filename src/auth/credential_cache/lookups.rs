//! The lookups in progress, which concurrent calls share.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use super::FoundCredential;
use crate::rpc::{caller::Caller, error::Error};

/// The lookups in progress. There are no more than calls in flight.
#[derive(Debug, Default)]
pub(super) struct Lookups(Mutex<HashMap<Caller, Weak<Lookup>>>);

/// A lookup that calls with the same credential share.
#[derive(Debug)]
pub(super) struct Lookup {
    pub(super) caller: Caller,
    /// Locked during the lookup. If it was dropped, the next call looks up.
    pub(super) outcome: tokio::sync::Mutex<Option<Result<Option<FoundCredential>, Error>>>,
    lookups: Arc<Lookups>,
}

impl Lookups {
    /// Returns the lookup in progress, or a new one.
    pub(super) fn join(self: &Arc<Self>, caller: Caller) -> Arc<Lookup> {
        let mut lookups = self.lock();
        if let Some(lookup) = lookups.get(&caller).and_then(Weak::upgrade) {
            return lookup;
        }
        let outcome = tokio::sync::Mutex::default();
        let lookup = Arc::new(Lookup { caller, outcome, lookups: self.clone() });
        lookups.insert(caller, Arc::downgrade(&lookup));
        lookup
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<Caller, Weak<Lookup>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        let mut lookups = self.lookups.lock();
        // Another one may have started after an invalidation.
        if lookups.get(&self.caller).is_some_and(|other| other.strong_count() == 0) {
            lookups.remove(&self.caller);
        }
    }
}
