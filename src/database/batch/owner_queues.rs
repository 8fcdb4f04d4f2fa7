//! The writes that wait for another write of their owner.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{BatchQuery, MAX_BATCH_LEN, job::Job};
use crate::types::id::UserId;

/// A queue for each owner whose writes wait. A queue exists as long as a task runs its writes.
pub(super) struct OwnerQueues<Q: BatchQuery>(Arc<Mutex<HashMap<UserId, Vec<Job<Q>>>>>);

impl<Q: BatchQuery> Clone for OwnerQueues<Q> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<Q: BatchQuery> Default for OwnerQueues<Q> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<Q: BatchQuery> OwnerQueues<Q> {
    /// Adds writes. Returns the owners that have a new queue, which needs a task.
    pub(super) fn push(&self, jobs: impl IntoIterator<Item = Job<Q>>) -> Vec<UserId> {
        let mut new = Vec::new();
        let mut queues = self.queues();
        for job in jobs {
            let Some(owner_id) = Q::writer(&job.input) else {
                continue;
            };
            let queue = queues.entry(owner_id).or_insert_with(|| {
                new.push(owner_id);
                Vec::new()
            });
            // Thus at most twice as many queries are in memory as there are calls.
            if queue.len() == queue.capacity() {
                queue.retain(|job| !job.is_dropped());
            }
            queue.push(job);
        }
        new
    }

    /// Takes the writes that share the next statement: at most one for each todo, because a
    /// statement changes a row once. Drops those whose calls are dropped.
    pub(super) fn take(&self, owner_id: UserId) -> Vec<Job<Q>> {
        let mut queues = self.queues();
        let Some(queue) = queues.get_mut(&owner_id) else {
            return Vec::new();
        };
        queue.retain(|job| !job.is_dropped());
        if queue.first().is_some_and(|job| job.runs_alone) {
            return vec![queue.remove(0)];
        }
        let mut targets = HashSet::new();
        let can_join = |job: &mut Job<Q>| {
            !job.runs_alone && Q::target(&job.input).is_none_or(|id| targets.insert(id))
        };
        queue.extract_if(.., can_join).take(MAX_BATCH_LEN).collect()
    }

    /// Returns `true` if the owner has no queue any more, and needs no task.
    pub(super) fn remove_if_empty(&self, owner_id: UserId) -> bool {
        let mut queues = self.queues();
        let is_empty = queues.get(&owner_id).is_none_or(Vec::is_empty);
        if is_empty {
            queues.remove(&owner_id);
        }
        is_empty
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.queues().is_empty()
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<UserId, Vec<Job<Q>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use sqlx::PgConnection;

    use super::{super::tests::job, *};
    use crate::{rpc::error::Error, types::id::TodoId};

    /// A change of a todo.
    #[derive(Debug)]
    struct TestUpdate;

    impl BatchQuery for TestUpdate {
        type Input = (UserId, TodoId, usize);
        type Output = ();

        async fn run_one(_: &mut PgConnection, _: &Self::Input) -> Result<(), Error> {
            unreachable!("there is no database")
        }

        async fn run_batch(
            _: &mut PgConnection,
            _: &[Self::Input],
        ) -> Result<Vec<Option<()>>, Error> {
            unreachable!("there is no database")
        }

        fn writer(&(owner_id, ..): &Self::Input) -> Option<UserId> {
            Some(owner_id)
        }

        fn target(&(_, id, _): &Self::Input) -> Option<TodoId> {
            Some(id)
        }
    }

    fn take(queues: &OwnerQueues<TestUpdate>, owner_id: UserId) -> Vec<usize> {
        queues.take(owner_id).into_iter().map(|job| job.input.2).collect()
    }

    #[test]
    fn a_statement_has_one_update_of_each_todo_and_none_of_a_dropped_call() {
        let (queues, owner_id) = (OwnerQueues::<TestUpdate>::default(), UserId::any());
        let todos = [TodoId::any(), TodoId::any()];
        let (mut jobs, mut receivers): (Vec<_>, Vec<_>) =
            (0..6).map(|number| job((owner_id, todos[number % 2], number))).unzip();
        jobs[3].runs_alone = true;
        assert_eq!(queues.push(jobs), [owner_id]);
        drop(receivers.remove(0));
        assert_eq!(take(&queues, owner_id), [1, 2]);
        assert_eq!(take(&queues, owner_id), [3]);
        assert!(!queues.remove_if_empty(owner_id));
        assert_eq!(take(&queues, owner_id), [4, 5]);
        assert!(queues.remove_if_empty(owner_id));
        assert!(queues.is_empty());
    }

    #[test]
    fn dropped_calls_leave_a_bounded_number_of_writes() {
        let (queues, owner_id) = (OwnerQueues::<TestUpdate>::default(), UserId::any());
        for number in 0..1_000 {
            let (job, _dropped) = job((owner_id, TodoId::any(), number));
            queues.push([job]);
        }
        assert!(queues.queues()[&owner_id].len() < 10);
    }
}
