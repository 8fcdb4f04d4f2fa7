//! The limit of concurrent writes to the todos of one owner.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::types::id::UserId;

/// The maximum number of write statements to the todos of one owner that are in progress on a
/// replica: one that holds the owner's clock, and the next one, which waits for it. Others would
/// only wait as well, each with a connection that other owners need.
///
/// Test: `writes_of_one_owner_wait_without_a_connection`.
const MAX_WRITES_PER_OWNER: usize = 2;

/// The writes of all owners.
#[derive(Clone, Debug, Default)]
pub(crate) struct OwnerWrites(Arc<Mutex<HashMap<UserId, Weak<Owner>>>>);

/// An owner with writes that are in progress or wait.
#[derive(Debug)]
struct Owner {
    id: UserId,
    permits: Arc<Semaphore>,
    owners: OwnerWrites,
}

/// A permit for one write statement.
#[derive(Debug)]
pub(crate) struct WritePermit {
    _permit: OwnedSemaphorePermit,
    /// An owner that is created again has all of its permits.
    _owner: Arc<Owner>,
}

impl OwnerWrites {
    /// Waits for a permit. Writes get theirs in the order in which they ask.
    pub(crate) async fn acquire(&self, owner_id: UserId) -> WritePermit {
        let owner = self.get(owner_id);
        let permit = owner.permits.clone().acquire_owned().await;
        WritePermit { _permit: permit.expect("the semaphore is never closed"), _owner: owner }
    }

    /// Returns a permit if the owner has no write in progress. Otherwise the write is better off
    /// in a statement with others.
    pub(crate) fn try_acquire_first(&self, owner_id: UserId) -> Option<WritePermit> {
        let owner = self.get(owner_id);
        if owner.permits.available_permits() < MAX_WRITES_PER_OWNER {
            return None;
        }
        let permit = owner.permits.clone().try_acquire_owned().ok()?;
        Some(WritePermit { _permit: permit, _owner: owner })
    }

    fn get(&self, id: UserId) -> Arc<Owner> {
        let mut owners = self.owners();
        if let Some(owner) = owners.get(&id).and_then(Weak::upgrade) {
            return owner;
        }
        let permits = Arc::new(Semaphore::new(MAX_WRITES_PER_OWNER));
        let owner = Arc::new(Owner { id, permits, owners: self.clone() });
        owners.insert(id, Arc::downgrade(&owner));
        owner
    }

    fn owners(&self) -> MutexGuard<'_, HashMap<UserId, Weak<Owner>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let mut owners = self.owners.owners();
        // The owner may have been created again already.
        if owners.get(&self.id).is_some_and(|owner| owner.strong_count() == 0) {
            owners.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn an_owner_has_two_permits_and_others_have_their_own() {
        let (writes, owner_id) = (OwnerWrites::default(), UserId::any());
        let first = writes.try_acquire_first(owner_id).expect("the first one");
        assert!(writes.try_acquire_first(owner_id).is_none());
        let second = writes.acquire(owner_id).await;
        let third = timeout(Duration::ZERO, writes.acquire(owner_id));
        assert!(third.await.is_err(), "the third write waits");
        assert!(writes.try_acquire_first(UserId::any()).is_some());
        drop(first);
        assert!(writes.try_acquire_first(owner_id).is_none(), "the second write is in progress");
        drop(second);
        assert!(writes.try_acquire_first(owner_id).is_some());
    }

    #[tokio::test]
    async fn an_owner_is_forgotten_after_its_last_write() {
        let (writes, owner_id) = (OwnerWrites::default(), UserId::any());
        let permits = (writes.acquire(owner_id).await, writes.acquire(owner_id).await);
        let waiting = timeout(Duration::ZERO, writes.acquire(owner_id));
        assert!(waiting.await.is_err(), "the third write is dropped while it waits");
        assert_eq!(writes.owners().len(), 1);
        drop(permits);
        assert!(writes.owners().is_empty());
    }
}
