//! The limits of concurrent writes to the todos of one owner, and of writes that wait.

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

/// The part of the connections, one in so many and at least one of several, that statements which
/// may wait for a clock leave to others: to reads, and to batches, which take only clocks that are
/// free. Most writes that run alone do not wait: a larger part would make them queue without need.
///
/// Test: `writes_that_wait_for_clocks_leave_connections_to_other_owners`.
const RESERVED_CONNECTIONS_DIVISOR: usize = 4;

/// Returns how many write statements that may wait for a clock are in progress on a replica, each
/// with a connection.
fn max_waiting(max_connections: usize) -> usize {
    (max_connections - max_connections.div_ceil(RESERVED_CONNECTIONS_DIVISOR)).max(1)
}

type Owners = Arc<Mutex<HashMap<UserId, Weak<Owner>>>>;

/// The writes of all owners.
#[derive(Clone, Debug)]
pub(crate) struct OwnerWrites {
    owners: Owners,
    waiting: Arc<Semaphore>,
}

/// An owner with writes that are in progress or wait.
#[derive(Debug)]
struct Owner {
    id: UserId,
    permits: Arc<Semaphore>,
    owners: Owners,
}

/// A permit for one write statement.
#[derive(Debug)]
pub(crate) struct WritePermit {
    _permit: OwnedSemaphorePermit,
    /// Of a statement that may wait for the clock.
    _waiting: Option<WaitingPermit>,
    /// An owner that is created again has all of its permits.
    _owner: Arc<Owner>,
}

/// A permit for one statement that may wait for a clock.
#[derive(Debug)]
pub(crate) struct WaitingPermit {
    _permit: OwnedSemaphorePermit,
}

impl OwnerWrites {
    /// Creates the limits for a pool of connections.
    pub(crate) fn new(max_connections: usize) -> Self {
        let waiting = Arc::new(Semaphore::new(max_waiting(max_connections)));
        Self { owners: Owners::default(), waiting }
    }

    /// Waits for a permit for a statement that may wait for the clock. Writes get theirs in the
    /// order in which they ask.
    pub(crate) async fn acquire(&self, owner_id: UserId) -> WritePermit {
        let permit = self.acquire_owner(owner_id).await;
        WritePermit { _waiting: Some(self.acquire_waiting().await), ..permit }
    }

    /// Waits for the part of a permit with which a statement may wait for the clock.
    pub(crate) async fn acquire_waiting(&self) -> WaitingPermit {
        let permit = self.waiting.clone().acquire_owned().await;
        WaitingPermit { _permit: permit.expect("the semaphore is never closed") }
    }

    /// Waits for a permit for a statement that does not wait for the clock.
    pub(crate) async fn acquire_owner(&self, owner_id: UserId) -> WritePermit {
        let owner = self.get(owner_id);
        let permit = owner.permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        WritePermit { _permit: permit, _waiting: None, _owner: owner }
    }

    /// Returns a permit for a statement that does not wait for the clock, if the owner has no write
    /// in progress. Otherwise the write is better off in a statement with others.
    pub(crate) fn try_acquire_first(&self, owner_id: UserId) -> Option<WritePermit> {
        let owner = self.get(owner_id);
        if owner.permits.available_permits() < MAX_WRITES_PER_OWNER {
            return None;
        }
        let permit = owner.permits.clone().try_acquire_owned().ok()?;
        Some(WritePermit { _permit: permit, _waiting: None, _owner: owner })
    }

    /// Does the same as [`Self::try_acquire_first`] for a statement that may wait for the clock.
    pub(crate) fn try_acquire_alone(&self, owner_id: UserId) -> Option<WritePermit> {
        let waiting = self.waiting.clone().try_acquire_owned().ok()?;
        let permit = self.try_acquire_first(owner_id)?;
        Some(WritePermit { _waiting: Some(WaitingPermit { _permit: waiting }), ..permit })
    }

    fn get(&self, id: UserId) -> Arc<Owner> {
        let mut owners = lock(&self.owners);
        if let Some(owner) = owners.get(&id).and_then(Weak::upgrade) {
            return owner;
        }
        let permits = Arc::new(Semaphore::new(MAX_WRITES_PER_OWNER));
        let owner = Arc::new(Owner { id, permits, owners: self.owners.clone() });
        owners.insert(id, Arc::downgrade(&owner));
        owner
    }
}

fn lock(owners: &Owners) -> MutexGuard<'_, HashMap<UserId, Weak<Owner>>> {
    owners.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Owner {
    fn drop(&mut self) {
        let mut owners = lock(&self.owners);
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
        let (writes, owner_id) = (OwnerWrites::new(4), UserId::any());
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
    async fn an_owner_is_removed_after_its_last_write() {
        let (writes, owner_id) = (OwnerWrites::new(4), UserId::any());
        let permits = (writes.acquire(owner_id).await, writes.acquire(owner_id).await);
        let waiting = timeout(Duration::ZERO, writes.acquire(owner_id));
        assert!(waiting.await.is_err(), "the third write is dropped while it waits");
        assert_eq!(lock(&writes.owners).len(), 1);
        drop(permits);
        assert!(lock(&writes.owners).is_empty());
    }

    #[test]
    fn writes_that_may_wait_leave_connections() {
        let limits = [1, 2, 3, 4, 8, 32].map(max_waiting);
        assert_eq!(limits, [1, 1, 2, 3, 6, 24]);
    }

    #[tokio::test]
    async fn a_write_that_does_not_wait_needs_no_permit_to_wait() {
        let (writes, owners) = (OwnerWrites::new(2), [(); 3].map(|()| UserId::any()));
        let waiting = writes.try_acquire_alone(owners[0]).expect("the first one that may wait");
        assert!(writes.try_acquire_alone(owners[1]).is_none());
        assert!(timeout(Duration::ZERO, writes.acquire(owners[1])).await.is_err(), "it waits");
        let _batched = writes.try_acquire_first(owners[1]).expect("a permit");
        drop(waiting);
        assert!(writes.try_acquire_alone(owners[2]).is_some());
    }
}
