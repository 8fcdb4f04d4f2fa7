//! Batches concurrent queries of the same kind into one SQL statement.
//!
//! If a permit is free, a call runs its query alone; otherwise it joins the next batch. The
//! busier the server, the larger the batches, and the more calls share one round trip and,
//! for writes, one commit. Each query has its own result.

use std::{fmt, sync::Arc, time::Duration};

use sqlx::PgConnection;
use tokio::{
    sync::{Mutex, Semaphore, mpsc, oneshot},
    time::timeout,
};

use super::Database;
use crate::{rpc::error::Error, telemetry::traces::TraceContext};

/// Statements of one kind in progress: one runs while the results of the other are delivered.
///
/// Test: `concurrent_calls_are_batched_and_each_gets_its_own_response`.
const MAX_CONCURRENT_BATCHES: usize = 2;

/// Queries in one statement. Larger batches delay their first query and save hardly anything.
///
/// Test: `concurrent_calls_are_batched_and_each_gets_its_own_response`.
const MAX_BATCH_LEN: usize = 32;

/// Queries in the queue. Further calls wait with theirs: a queued query stays in memory even if
/// its call is dropped.
///
/// Test: `dropped_calls_leave_a_bounded_number_of_queries`.
const MAX_QUEUED: usize = MAX_CONCURRENT_BATCHES * MAX_BATCH_LEN;

/// A kind of query that can run alone or in a batch.
pub(crate) trait BatchQuery: fmt::Debug + 'static {
    /// The parameters of one query.
    type Input: Send + Sync + 'static;
    /// The result of one query.
    type Output: Send + 'static;

    /// Runs one query.
    fn run_one(
        connection: &mut PgConnection,
        input: &Self::Input,
    ) -> impl Future<Output = Result<Self::Output, Error>> + Send;

    /// Runs several queries with one statement, and returns their results in order. `None`
    /// asks for a query to run alone, because it would block or fail the others.
    fn run_batch(
        connection: &mut PgConnection,
        inputs: &[Self::Input],
    ) -> impl Future<Output = Result<Vec<Option<Self::Output>>, Error>> + Send;
}

/// Runs queries of one kind, batched or not.
pub(crate) struct QueryBatcher<Q: BatchQuery> {
    database: Database,
    /// `None` if batching is disabled.
    queue: Option<Queue<Q>>,
}

struct Queue<Q: BatchQuery> {
    permits: Arc<Semaphore>,
    jobs: mpsc::Sender<Job<Q>>,
}

/// A queued query.
struct Job<Q: BatchQuery> {
    input: Q::Input,
    responder: Responder<Q::Output>,
}

impl<Q: BatchQuery> fmt::Debug for QueryBatcher<Q> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("QueryBatcher").finish_non_exhaustive()
    }
}

impl<Q: BatchQuery> QueryBatcher<Q> {
    /// Creates a batcher, which needs a runtime. A batch that takes longer than `deadline`
    /// fails: no call waits for longer.
    #[must_use]
    pub(crate) fn new(database: Database, enabled: bool, deadline: Duration) -> Self {
        let queue = enabled.then(|| Queue::start(&database, deadline));
        Self { database, queue }
    }

    /// Runs one query. A call that is dropped before its batch starts runs none.
    pub(crate) async fn run(&self, input: Q::Input) -> Result<Q::Output, Error> {
        let Some(Queue { permits, jobs }) = &self.queue else {
            return run_single::<Q>(&self.database, &input).await;
        };
        if let Ok(_permit) = permits.try_acquire() {
            return run_single::<Q>(&self.database, &input).await;
        }
        let (sender, receiver) = oneshot::channel();
        let responder = Responder { sender, trace: TraceContext::current() };
        jobs.send(Job { input, responder }).await.map_err(|_| reply_dropped())?;
        receiver.await.map_err(|_| reply_dropped())?
    }
}

/// Arranges rows by the ordinal of their query, counted from 1 as `with ordinality` does. A
/// query without a row gets `Some(None)`; a query whose row cannot be read gets `None`, and
/// runs alone, so that it fails no other.
#[expect(clippy::option_option, reason = "an outcome, and whether there is a row")]
pub(crate) fn by_ordinal<T>(
    len: usize,
    rows: impl IntoIterator<Item = (i64, Result<T, Error>)>,
) -> Vec<Option<Option<T>>> {
    let mut outputs: Vec<_> = std::iter::repeat_with(|| Some(None)).take(len).collect();
    for (ordinal, row) in rows {
        let output = usize::try_from(ordinal - 1).ok().and_then(|index| outputs.get_mut(index));
        if let Some(output) = output {
            *output = row.ok().map(Some);
        }
    }
    outputs
}

fn reply_dropped() -> Error {
    Error::internal("a batch ended without the result of a query")
}

impl<Q: BatchQuery> Queue<Q> {
    /// Starts one worker for each permit. They run as long as the batcher exists.
    fn start(database: &Database, deadline: Duration) -> Self {
        let permits = Arc::new(Semaphore::new(MAX_CONCURRENT_BATCHES));
        let (jobs, receiver) = mpsc::channel(MAX_QUEUED);
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..MAX_CONCURRENT_BATCHES {
            let worker = Worker {
                database: database.clone(),
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
struct Worker<Q: BatchQuery> {
    database: Database,
    permits: Arc<Semaphore>,
    receiver: Arc<Mutex<mpsc::Receiver<Job<Q>>>>,
    deadline: Duration,
}

impl<Q: BatchQuery> Clone for Worker<Q> {
    fn clone(&self) -> Self {
        Self {
            database: self.database.clone(),
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

    async fn run_batch(&self, jobs: impl Iterator<Item = Job<Q>>) {
        let live = jobs.filter(|job| !job.responder.sender.is_closed());
        let (inputs, responders): (Vec<_>, Vec<_>) =
            live.map(|job| (job.input, job.responder)).unzip();
        // The first call of the batch has its spans and log lines.
        let Some(trace) = responders.first().map(|responder| responder.trace.clone()) else {
            return;
        };
        let outputs = self.database.run(async |connection| match &*inputs {
            [input] => Ok(vec![Some(Q::run_one(connection, input).await?)]),
            inputs => Q::run_batch(connection, inputs).await,
        });
        let outputs = timeout(self.deadline, trace.in_context(outputs)).await;
        match outputs.unwrap_or(Err(Error::DeadlineExceeded)) {
            Ok(outputs) => {
                for ((input, responder), output) in inputs.into_iter().zip(responders).zip(outputs)
                {
                    match output {
                        Some(output) => responder.send(Ok(output)),
                        // In a task of its own: the next batch does not wait for it.
                        None => drop(tokio::spawn(responder.run_alone::<Q>(
                            self.database.clone(),
                            input,
                            self.deadline,
                        ))),
                    }
                }
            }
            Err(error) => {
                // The first call that still waits logs the source.
                let waiting = |responder: &Responder<_>| !responder.sender.is_closed();
                let mut responders = responders.into_iter().filter(waiting);
                let first = responders.next();
                responders.for_each(|responder| responder.send(Err(error.duplicate())));
                if let Some(first) = first {
                    first.send(Err(error));
                }
            }
        }
    }
}

/// Sends the result to the call that waits for it.
struct Responder<T> {
    sender: oneshot::Sender<Result<T, Error>>,
    trace: TraceContext,
}

impl<T> Responder<T> {
    fn send(self, output: Result<T, Error>) {
        // Fails if the call was dropped.
        let _ = self.sender.send(output);
    }

    async fn run_alone<Q: BatchQuery<Output = T>>(
        mut self,
        database: Database,
        input: Q::Input,
        deadline: Duration,
    ) {
        let output = self.trace.clone().in_context(run_single::<Q>(&database, &input));
        let output = tokio::select! {
            output = timeout(deadline, output) => output,
            () = self.sender.closed() => return,
        };
        self.send(output.unwrap_or(Err(Error::DeadlineExceeded)));
    }
}

async fn run_single<Q: BatchQuery>(
    database: &Database,
    input: &Q::Input,
) -> Result<Q::Output, Error> {
    database.run(async |connection| Q::run_one(connection, input).await).await
}

#[cfg(test)]
mod tests {
    use sqlx::postgres::PgConnectOptions;

    use super::*;

    /// A query that never gets a permit.
    #[derive(Debug)]
    struct TestQuery;

    impl BatchQuery for TestQuery {
        type Input = ();
        type Output = ();

        async fn run_one(_: &mut PgConnection, (): &()) -> Result<(), Error> {
            unreachable!("there is no database")
        }

        async fn run_batch(_: &mut PgConnection, _: &[()]) -> Result<Vec<Option<()>>, Error> {
            unreachable!("there is no database")
        }
    }

    #[tokio::test]
    async fn dropped_calls_leave_a_bounded_number_of_queries() {
        let database = Database::new(PgConnectOptions::new_without_pgpass(), 1);
        let database = database.expect("a pool without connections");
        let batcher = QueryBatcher::<TestQuery>::new(database, true, Duration::MAX);
        let queue = batcher.queue.as_ref().expect("batching is enabled");
        let _busy = queue.permits.acquire_many(2).await.expect("the permits of both batches");
        for _ in 0..1_000 {
            let call = timeout(Duration::ZERO, batcher.run(()));
            assert!(call.await.is_err(), "the call is dropped while it waits");
            tokio::task::yield_now().await;
        }
        assert_eq!(queue.jobs.max_capacity() - queue.jobs.capacity(), 64);
    }

    #[tokio::test]
    async fn one_call_of_a_failed_batch_logs_the_source() {
        let nowhere = PgConnectOptions::new_without_pgpass().socket("/nowhere");
        let worker = Worker::<TestQuery> {
            database: Database::new(nowhere, 1).expect("a pool without connections"),
            permits: Arc::new(Semaphore::new(1)),
            receiver: Arc::new(Mutex::new(mpsc::channel(1).1)),
            deadline: Duration::from_secs(5),
        };
        let (jobs, receivers): (Vec<_>, Vec<_>) = std::iter::repeat_with(|| {
            let (sender, receiver) = oneshot::channel();
            let responder = Responder { sender, trace: TraceContext::current() };
            (Job { input: (), responder }, receiver)
        })
        .take(3)
        .unzip();
        worker.run_batch(jobs.into_iter()).await;
        let mut duplicates = Vec::new();
        for receiver in receivers {
            let error = receiver.await.expect("a result").expect_err("there is no database");
            assert!(matches!(error, Error::DatabaseUnavailable(_)), "{error:?}");
            duplicates.push(error.is_duplicate());
        }
        assert_eq!(duplicates, [false, true, true]);
    }
}
