//! The queue of a batcher, and the workers that run it.

use std::{collections::HashMap, future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};

use tokio::{
    sync::{Mutex, Semaphore, mpsc, oneshot},
    time::timeout,
};

use super::{BatchQuery, MAX_BATCH_LEN, MAX_CONCURRENT_BATCHES, MAX_QUEUED};
use crate::{
    database::Database,
    limits::owner_writes::{OwnerWrites, WritePermit},
    rpc::error::Error,
    telemetry::traces::TraceContext,
    types::id::UserId,
};

pub(super) struct Queue<Q: BatchQuery> {
    pub(super) permits: Arc<Semaphore>,
    pub(super) jobs: mpsc::Sender<Job<Q>>,
}

/// A queued query.
pub(super) struct Job<Q: BatchQuery> {
    pub(super) input: Q::Input,
    pub(super) responder: Responder<Q::Output>,
}

impl<Q: BatchQuery> Job<Q> {
    /// Returns `true` if the call was dropped.
    fn is_dropped(&self) -> bool {
        self.responder.sender.is_closed()
    }
}

/// Sends the result to the call that waits for it.
pub(super) struct Responder<T> {
    pub(super) sender: oneshot::Sender<Result<T, Error>>,
    pub(super) trace: TraceContext,
}

impl<T> Responder<T> {
    fn send(self, output: Result<T, Error>) {
        // Fails if the call was dropped.
        let _ = self.sender.send(output);
    }
}

impl<Q: BatchQuery> Queue<Q> {
    /// Starts one worker for each permit. They run as long as the batcher exists.
    pub(super) fn start(database: &Database, writes: &OwnerWrites, deadline: Duration) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT_BATCHES));
        let (jobs, receiver) = mpsc::channel(MAX_QUEUED);
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..MAX_CONCURRENT_BATCHES {
            let worker = Worker {
                database: database.clone(),
                writes: writes.clone(),
                permits: permits.clone(),
                receiver: receiver.clone(),
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
    pub(super) deadline: Duration,
}

impl<Q: BatchQuery> Clone for Worker<Q> {
    fn clone(&self) -> Self {
        Self {
            database: self.database.clone(),
            writes: self.writes.clone(),
            permits: self.permits.clone(),
            receiver: self.receiver.clone(),
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
        let mut permits = HashMap::new();
        let (jobs, waiting): (Vec<_>, Vec<_>) = jobs
            .filter(|job| !job.is_dropped())
            .partition(|job| self.try_reserve(&mut permits, &job.input));
        self.spawn_groups(waiting);
        let permits: Vec<_> = permits.into_values().collect();
        let undone = self.run_statement(Mode::Batch, permits, jobs).await;
        self.spawn_groups(undone);
    }

    /// Returns whether the query can join the batch. A write needs a permit of its owner, which
    /// all writes of the owner in the batch share.
    fn try_reserve(&self, permits: &mut HashMap<UserId, WritePermit>, input: &Q::Input) -> bool {
        let Some(owner_id) = Q::writer(input) else {
            return true;
        };
        if permits.contains_key(&owner_id) {
            return true;
        }
        let permit = self.writes.try_acquire(owner_id);
        permit.map(|permit| permits.insert(owner_id, permit)).is_some()
    }

    /// Runs the queries that cannot be part of the batch. In tasks of their own: the next batch
    /// does not wait for them.
    fn spawn_groups(&self, jobs: Vec<Job<Q>>) {
        let mut by_owner = HashMap::<_, Vec<_>>::new();
        for job in jobs {
            match Q::writer(&job.input) {
                Some(owner_id) => by_owner.entry(owner_id).or_default().push(job),
                None => drop(tokio::spawn(self.clone().run_group(None, vec![job]))),
            }
        }
        for (owner_id, jobs) in by_owner {
            tokio::spawn(self.clone().run_group(Some(owner_id), jobs));
        }
    }

    /// Runs queries of one owner. Those that the statement of all leaves undone run alone.
    async fn run_group(self, owner_id: Option<UserId>, jobs: Vec<Job<Q>>) {
        for job in self.run_permitted(owner_id, jobs).await {
            self.run_permitted(owner_id, vec![job]).await;
        }
    }

    /// Runs queries of one owner, as soon as it has a permit for a write. Returns those that are
    /// left undone.
    async fn run_permitted(&self, owner_id: Option<UserId>, mut jobs: Vec<Job<Q>>) -> Vec<Job<Q>> {
        let Some(owner_id) = owner_id else {
            return self.run_statement(Mode::Group, (), jobs).await;
        };
        if let Ok(permit) = timeout(self.deadline, self.acquire(owner_id, &mut jobs)).await {
            return self.run_statement(Mode::Group, permit, jobs).await;
        }
        for job in jobs {
            job.responder.send(Err(Error::DeadlineExceeded));
        }
        Vec::new()
    }

    /// Waits for a permit. Drops the queries whose calls are dropped meanwhile, and waits no longer
    /// if none is left.
    async fn acquire(&self, owner_id: UserId, jobs: &mut Vec<Job<Q>>) -> Option<WritePermit> {
        let mut permit = pin!(self.writes.acquire(owner_id));
        loop {
            tokio::select! {
                permit = &mut permit => return Some(permit),
                () = any_dropped(jobs) => jobs.retain(|job| !job.is_dropped()),
            }
            if jobs.is_empty() {
                return None;
            }
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
            outputs = outputs => outputs,
            () = all_dropped(&mut responders), if matches!(mode, Mode::Group) => {
                return Vec::new();
            }
        };
        let mut undone = Vec::new();
        match outputs.unwrap_or(Err(Error::DeadlineExceeded)) {
            Ok(outputs) => {
                for ((input, responder), output) in inputs.into_iter().zip(responders).zip(outputs)
                {
                    match output {
                        Some(output) => responder.send(Ok(output)),
                        None => undone.push(Job { input, responder }),
                    }
                }
            }
            Err(error) => send_error(responders, error),
        }
        undone
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

/// Waits until one of the calls is dropped.
async fn any_dropped<Q: BatchQuery>(jobs: &mut [Job<Q>]) {
    poll_fn(|context| {
        let poll = |job: &mut Job<Q>| job.responder.sender.poll_closed(context).is_ready();
        if jobs.iter_mut().any(poll) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Waits until all calls are dropped.
async fn all_dropped<T>(responders: &mut [Responder<T>]) {
    for responder in responders {
        responder.sender.closed().await;
    }
}
