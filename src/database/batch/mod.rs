//! Batches concurrent queries of the same kind into one SQL statement.
//!
//! If a permit is free, a call runs its query alone; otherwise it joins the next batch. The
//! busier the server, the larger the batches, and the more calls share one round trip and,
//! for writes, one commit. Each query has its own result.
//!
//! Writes take the clock of their owner. A batch takes only clocks that are free. While an owner
//! has a write in progress, further ones queue for the owner, and share the next statement.

mod job;
mod owner_queues;
mod worker;

use std::{fmt, pin::pin, time::Duration};

use sqlx::PgConnection;
use tokio::{sync::oneshot, time::timeout};

use self::{
    job::{Job, Responder},
    worker::Queue,
};
use super::Database;
use crate::{
    limits::owner_writes::{OwnerWrites, WritePermit},
    rpc::error::Error,
    telemetry::traces::TraceContext,
    types::id::{TodoId, UserId},
};

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

/// How long a write that runs alone counts among the statements in progress. If it takes longer,
/// it most likely waits for the clock of its owner, and those of other owners must not wait, too.
///
/// Test: `a_write_that_waits_for_a_clock_delays_no_other_owner`.
const CLOCK_WAIT_THRESHOLD: Duration = Duration::from_millis(20);

/// How often queued writes are tried without waiting for the clock of their owner, while too many
/// others wait for clocks.
///
/// Test: `writes_that_wait_for_clocks_leave_connections_to_other_owners`.
const CLOCK_RETRY_INTERVAL: Duration = Duration::from_millis(50);

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
    /// asks for a query to run without the others, because it would block or fail them.
    fn run_batch(
        connection: &mut PgConnection,
        inputs: &[Self::Input],
    ) -> impl Future<Output = Result<Vec<Option<Self::Output>>, Error>> + Send;

    /// Returns the owner to whose todos the query writes, or `None` if it reads.
    fn writer(_input: &Self::Input) -> Option<UserId> {
        None
    }

    /// Returns the todo that the query changes. A statement changes each todo once.
    fn target(_input: &Self::Input) -> Option<TodoId> {
        None
    }

    /// Does the same as [`Self::run_batch`] for writes of one owner, and may wait for another
    /// write of the owner. `None` asks for a query to run alone.
    fn run_group(
        connection: &mut PgConnection,
        inputs: &[Self::Input],
    ) -> impl Future<Output = Result<Vec<Option<Self::Output>>, Error>> + Send {
        Self::run_batch(connection, inputs)
    }
}

/// Runs queries of one kind, batched or not.
pub(crate) struct QueryBatcher<Q: BatchQuery> {
    database: Database,
    writes: OwnerWrites,
    /// `None` if batching is disabled.
    queue: Option<Queue<Q>>,
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
        let writes = OwnerWrites::new(database.max_connections());
        Self::with_writes(database, writes, enabled, deadline)
    }

    /// Does the same as [`Self::new`] for writes, which `writes` limits.
    #[must_use]
    pub(crate) fn with_writes(
        database: Database,
        writes: OwnerWrites,
        enabled: bool,
        deadline: Duration,
    ) -> Self {
        let queue = enabled.then(|| Queue::start(&database, &writes, deadline));
        Self { database, writes, queue }
    }

    /// Runs one query. A call that is dropped before its batch starts runs none.
    pub(crate) async fn run(&self, input: Q::Input) -> Result<Q::Output, Error> {
        let writer = Q::writer(&input);
        let Some(Queue { permits, jobs }) = &self.queue else {
            let permit = match writer {
                Some(owner_id) => Some(self.writes.acquire(owner_id).await),
                None => None,
            };
            return self.run_single(permit, &input).await;
        };
        if let Ok(batch_permit) = permits.try_acquire() {
            let Some(owner_id) = writer else {
                return self.run_single(None, &input).await;
            };
            // Otherwise it joins a batch, or waits with other writes of its owner.
            if let Some(permit) = self.writes.try_acquire_alone(owner_id) {
                let mut running = pin!(self.run_single(Some(permit), &input));
                if let Ok(output) = timeout(CLOCK_WAIT_THRESHOLD, &mut running).await {
                    return output;
                }
                drop(batch_permit);
                return running.await;
            }
        }
        let (sender, receiver) = oneshot::channel();
        let responder = Responder { sender, trace: TraceContext::current() };
        jobs.send(Job::new(input, responder)).await.map_err(|_| reply_dropped())?;
        receiver.await.map_err(|_| reply_dropped())?
    }

    async fn run_single(
        &self,
        permit: Option<WritePermit>,
        input: &Q::Input,
    ) -> Result<Q::Output, Error> {
        let work = async |connection: &mut PgConnection| Q::run_one(connection, input).await;
        self.database.run_guarded(permit, work).await
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sqlx::postgres::PgConnectOptions;
    use tokio::sync::{Mutex, Semaphore, mpsc};

    use super::{owner_queues::OwnerQueues, worker::Worker, *};

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

    /// A write whose statement may panic: when it drops its input.
    #[derive(Debug)]
    struct TestWrite {
        owner_id: UserId,
        panics: bool,
    }

    impl Drop for TestWrite {
        fn drop(&mut self) {
            assert!(!self.panics, "the statement panics");
        }
    }

    impl BatchQuery for TestWrite {
        type Input = Self;
        type Output = ();

        async fn run_one(_: &mut PgConnection, _: &Self) -> Result<(), Error> {
            unreachable!("there is no database")
        }

        async fn run_batch(_: &mut PgConnection, _: &[Self]) -> Result<Vec<Option<()>>, Error> {
            unreachable!("there is no database")
        }

        fn writer(write: &Self) -> Option<UserId> {
            Some(write.owner_id)
        }
    }

    fn worker_without_database<Q: BatchQuery>() -> Worker<Q> {
        let nowhere = PgConnectOptions::new_without_pgpass().socket("/nowhere");
        Worker {
            database: Database::new(nowhere, 1).expect("a pool without connections"),
            writes: OwnerWrites::new(4),
            permits: Arc::new(Semaphore::new(1)),
            receiver: Arc::new(Mutex::new(mpsc::channel(1).1)),
            owner_queues: OwnerQueues::default(),
            deadline: Duration::from_secs(5),
        }
    }

    pub(super) fn job<Q: BatchQuery>(
        input: Q::Input,
    ) -> (Job<Q>, oneshot::Receiver<Result<Q::Output, Error>>) {
        let (sender, receiver) = oneshot::channel();
        (Job::new(input, Responder { sender, trace: TraceContext::current() }), receiver)
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
        let worker = worker_without_database::<TestQuery>();
        let (jobs, receivers): (Vec<_>, Vec<_>) = (0..3).map(|_| job(())).unzip();
        worker.run_batch(jobs.into_iter()).await;
        let mut duplicates = Vec::new();
        for receiver in receivers {
            let error = receiver.await.expect("a result").expect_err("there is no database");
            assert!(matches!(error, Error::DatabaseUnavailable(_)), "{error:?}");
            duplicates.push(error.is_duplicate());
        }
        assert_eq!(duplicates, [false, true, true]);
    }

    #[tokio::test]
    async fn a_panic_leaves_the_writes_that_wait_in_the_queue() {
        let worker = worker_without_database::<TestWrite>();
        let owner_id = UserId::any();
        let _in_progress = worker.writes.acquire(owner_id).await;
        // More than one statement has.
        let (jobs, receivers): (Vec<_>, Vec<_>) =
            (0..40).map(|number| job(TestWrite { owner_id, panics: number == 0 })).unzip();
        worker.run_batch(jobs.into_iter()).await;
        for receiver in receivers {
            let result = timeout(Duration::from_secs(5), receiver).await.expect("in time");
            result.expect("a result").expect_err("there is no database");
        }
        // The task of the owner removes the queue after the last result.
        let removed = async {
            while !worker.owner_queues.is_empty() {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(5), removed).await.expect("the queue is removed");
    }
}
