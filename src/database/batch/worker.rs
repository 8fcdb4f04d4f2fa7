//! The queue of a batcher, and the workers that run it.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Mutex, Semaphore, mpsc},
    time::timeout,
};

use super::{
    BatchQuery, CLOCK_RETRY_INTERVAL, MAX_BATCH_LEN, MAX_CONCURRENT_BATCHES, MAX_QUEUED,
    job::{Job, Responder},
    owner_queues::OwnerQueues,
};
use crate::{
    database::Database,
    limits::owner_writes::{OwnerWrites, WritePermit},
    rpc::error::Error,
    types::id::{TodoId, UserId},
};

pub(super) struct Queue<Q: BatchQuery> {
    pub(super) permits: Arc<Semaphore>,
    pub(super) jobs: mpsc::Sender<Job<Q>>,
}

impl<Q: BatchQuery> Queue<Q> {
    /// Starts one worker for each permit. They run as long as the batcher exists.
    pub(super) fn start(database: &Database, writes: &OwnerWrites, deadline: Duration) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT_BATCHES));
        let (jobs, receiver) = mpsc::channel(MAX_QUEUED);
        let receiver = Arc::new(Mutex::new(receiver));
        let owner_queues = OwnerQueues::default();
        for _ in 0..MAX_CONCURRENT_BATCHES {
            let worker = Worker {
                database: database.clone(),
                writes: writes.clone(),
                permits: permits.clone(),
                receiver: receiver.clone(),
                owner_queues: owner_queues.clone(),
                deadline,
            };
            tokio::spawn(async move {
                // A panic fails one batch, not the worker.
                while tokio::spawn(worker.clone().run()).await.is_err() {}
            });
        }
        Self { permits, jobs }
    }
}

/// Runs the queued queries in batches.
pub(super) struct Worker<Q: BatchQuery> {
    pub(super) database: Database,
    pub(super) writes: OwnerWrites,
    pub(super) permits: Arc<Semaphore>,
    pub(super) receiver: Arc<Mutex<mpsc::Receiver<Job<Q>>>>,
    pub(super) owner_queues: OwnerQueues<Q>,
    pub(super) deadline: Duration,
}

impl<Q: BatchQuery> Clone for Worker<Q> {
    fn clone(&self) -> Self {
        Self {
            database: self.database.clone(),
            writes: self.writes.clone(),
            permits: self.permits.clone(),
            receiver: self.receiver.clone(),
            owner_queues: self.owner_queues.clone(),
            deadline: self.deadline,
        }
    }
}

impl<Q: BatchQuery> Worker<Q> {
    async fn run(self) {
        let mut batch = Vec::with_capacity(MAX_BATCH_LEN);
        loop {
            // Held until the permit is there, so that all queries queued by then join the batch.
            let mut receiver = self.receiver.lock().await;
            let Some(first) = receiver.recv().await else {
                return;
            };
            let Ok(_permit) = self.permits.acquire().await else {
                return;
            };
            batch.push(first);
            while batch.len() < MAX_BATCH_LEN
                && let Ok(next) = receiver.try_recv()
            {
                batch.push(next);
            }
            drop(receiver);
            self.run_batch(batch.drain(..)).await;
        }
    }

    pub(super) async fn run_batch(&self, jobs: impl Iterator<Item = Job<Q>>) {
        let mut reserved = Reserved::default();
        let (jobs, waiting): (Vec<_>, Vec<_>) = jobs
            .filter(|job| !job.is_dropped())
            .partition(|job| reserved.try_add::<Q>(&self.writes, &job.input));
        self.run_later(waiting);
        let permits: Vec<_> = reserved.permits.into_values().collect();
        let undone = self.run_statement(Mode::Batch, permits, jobs).await;
        self.run_later(undone);
    }

    /// Runs the queries that cannot be part of the batch. In tasks of their own: the next batch
    /// does not wait for them.
    fn run_later(&self, jobs: Vec<Job<Q>>) {
        let (writes, reads): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|job| Q::writer(&job.input).is_some());
        for job in reads {
            let worker = self.clone();
            tokio::spawn(async move { worker.run_statement(Mode::Group, (), vec![job]).await });
        }
        for owner_id in self.owner_queues.push(writes) {
            let worker = self.clone();
            tokio::spawn(async move {
                // A panic fails one statement, not the queries that wait.
                while tokio::spawn(worker.clone().run_owner(owner_id)).await.is_err() {}
            });
        }
    }

    /// Runs the queued writes of one owner. Those that arrive during a statement share the next.
    pub(super) async fn run_owner(self, owner_id: UserId) {
        while !self.owner_queues.remove_if_empty(owner_id) {
            let permit = self.writes.acquire_owner(owner_id).await;
            let waiting = timeout(CLOCK_RETRY_INTERVAL, self.writes.acquire_waiting()).await;
            // Clocks of other owners must not delay writes whose own clock is free.
            let mode = if waiting.is_ok() { Mode::Group } else { Mode::Batch };
            let jobs = self.owner_queues.take(owner_id);
            let undone = self.run_statement(mode, (permit, waiting), jobs).await;
            let runs_alone = matches!(mode, Mode::Group);
            self.owner_queues.push(undone.into_iter().map(|job| Job { runs_alone, ..job }));
        }
    }

    /// Runs queries and sends their results. Returns those that have to run in another way.
    async fn run_statement(
        &self,
        mode: Mode,
        guard: impl Send + 'static,
        jobs: Vec<Job<Q>>,
    ) -> Vec<Job<Q>> {
        let (inputs, mut responders): (Vec<_>, Vec<_>) =
            jobs.into_iter().map(|job| (job.input, job.responder)).unzip();
        // The first call has the spans and log lines of the statement.
        let Some(trace) = responders.first().map(|responder| responder.trace.clone()) else {
            return Vec::new();
        };
        let outputs = self.database.run_guarded(guard, async |connection| match (&*inputs, mode) {
            // A write that runs alone may wait for a clock, and the worker with it.
            ([input], Mode::Batch) if Q::writer(input).is_none() => {
                Ok(vec![Some(Q::run_one(connection, input).await?)])
            }
            (inputs, Mode::Batch) => Q::run_batch(connection, inputs).await,
            ([input], Mode::Group) => Ok(vec![Some(Q::run_one(connection, input).await?)]),
            (inputs, Mode::Group) => Q::run_group(connection, inputs).await,
        });
        let outputs = timeout(self.deadline, trace.in_context(outputs));
        let outputs = tokio::select! {
            biased;
            () = all_dropped(&mut responders), if matches!(mode, Mode::Group) => {
                return Vec::new();
            }
            outputs = outputs => outputs,
        };
        let mut undone = Vec::new();
        match outputs.unwrap_or(Err(Error::DeadlineExceeded)) {
            Ok(outputs) => {
                for ((input, responder), output) in inputs.into_iter().zip(responders).zip(outputs)
                {
                    match output {
                        Some(output) => responder.send(Ok(output)),
                        None => undone.push(Job::new(input, responder)),
                    }
                }
            }
            Err(error) => send_error(responders, error),
        }
        undone
    }
}

/// What the writes of a batch have for themselves.
#[derive(Default)]
struct Reserved {
    /// A permit of each owner, which all of the owner's writes in the batch share.
    permits: HashMap<UserId, WritePermit>,
    targets: HashSet<(UserId, TodoId)>,
}

impl Reserved {
    /// Returns whether the query can join the batch: a write needs an owner without a write in
    /// progress, and the todo to itself.
    fn try_add<Q: BatchQuery>(&mut self, writes: &OwnerWrites, input: &Q::Input) -> bool {
        let Some(owner_id) = Q::writer(input) else {
            return true;
        };
        if let Entry::Vacant(vacant) = self.permits.entry(owner_id) {
            let Some(permit) = writes.try_acquire_first(owner_id) else {
                return false;
            };
            vacant.insert(permit);
        }
        Q::target(input).is_none_or(|id| self.targets.insert((owner_id, id)))
    }
}

/// Which queries a statement runs.
#[derive(Clone, Copy)]
enum Mode {
    /// Queries of any owners. The statement waits for none of them.
    Batch,
    /// Queries of one owner.
    Group,
}

/// The first call that still waits logs the source.
fn send_error<T>(responders: Vec<Responder<T>>, error: Error) {
    let waiting = |responder: &Responder<_>| !responder.sender.is_closed();
    let mut responders = responders.into_iter().filter(waiting);
    let first = responders.next();
    responders.for_each(|responder| responder.send(Err(error.duplicate())));
    if let Some(first) = first {
        first.send(Err(error));
    }
}

/// Waits until all calls are dropped.
async fn all_dropped<T>(responders: &mut [Responder<T>]) {
    for responder in responders {
        responder.sender.closed().await;
    }
}
