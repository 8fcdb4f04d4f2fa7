//! One statement for what several calls ask at once.
//!
//! Few statements of a kind run at once. A call that finds a turn free asks by itself, by
//! the statement that asks for it alone. The others wait, and are asked for by one statement
//! in a turn of their own, while new ones gather. So the busier the service, the
//! more calls share a statement, its round trip and, where it writes, its commit.

use std::{fmt, sync::Arc, time::Duration};

use sqlx::PgConnection;
use tokio::{
    sync::{Mutex, Semaphore, mpsc, oneshot},
    time::timeout,
};

use crate::{database::Database, error::Error, traces::CurrentCall};

/// Statements of one kind under way at once: one runs while the answers of the other are
/// on their way.
const TURNS: usize = 2;

/// Questions in one statement. More make those that come first wait for the others, and
/// save hardly anything.
const MAX_BATCH: usize = 32;

/// Questions that wait, at the most; calls beyond wait with theirs. A question that waits
/// here is kept even when its call is given up.
const MAX_WAITING: usize = TURNS * MAX_BATCH;

/// What is asked of the database: by one call, or by several at once.
pub trait Statement: fmt::Debug + 'static {
    /// What one call asks.
    type Question: Send + Sync + 'static;
    /// What it is answered.
    type Answer: Send + 'static;

    /// Answers one question.
    fn one(
        connection: &mut PgConnection,
        question: &Self::Question,
    ) -> impl Future<Output = Result<Self::Answer, Error>> + Send;

    /// Answers several questions, in their order. Those that are `None` are to be asked
    /// alone: they would hold up or spoil the others.
    fn many(
        connection: &mut PgConnection,
        questions: &[Self::Question],
    ) -> impl Future<Output = Result<Vec<Option<Self::Answer>>, Error>> + Send;
}

/// Asks a statement, together with whoever else does.
pub struct Coalescer<S: Statement> {
    database: Database,
    /// `None`: each asks alone.
    queue: Option<Queue<S>>,
}

/// Where questions wait for a turn.
struct Queue<S: Statement> {
    turns: Arc<Semaphore>,
    waiting: mpsc::Sender<Waiting<S>>,
}

struct Waiting<S: Statement> {
    question: S::Question,
    caller: Asker<S::Answer>,
}

impl<S: Statement> fmt::Debug for Coalescer<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Coalescer").finish_non_exhaustive()
    }
}

impl<S: Statement> Coalescer<S> {
    /// Has questions asked together, or, where one statement must not be about several
    /// owners, each alone. `limit` is the longest time for which a call waits.
    #[must_use]
    pub fn new(database: Database, together: bool, limit: Duration) -> Self {
        let queue = together.then(|| Queue::start(&database, limit));
        Self { database, queue }
    }

    /// Asks. A call that is dropped before its turn asks nothing.
    pub async fn ask(&self, question: S::Question) -> Result<S::Answer, Error> {
        let Some(Queue { turns, waiting }) = &self.queue else {
            return alone::<S>(&self.database, &question).await;
        };
        if let Ok(_turn) = turns.try_acquire() {
            return alone::<S>(&self.database, &question).await;
        }
        let (answer, answered) = oneshot::channel();
        let caller = Asker { answer, call: CurrentCall::get() };
        waiting.send(Waiting { question, caller }).await.map_err(|_| unanswered())?;
        answered.await.map_err(|_| unanswered())?
    }
}

/// Brings what was found into the order of `count` questions; where nothing was, the answer
/// is `None`. Questions are counted from 1, as `with ordinality` does. What cannot be read is
/// asked for alone, and so concerns nobody else.
pub fn in_order<A>(
    count: usize,
    found: impl IntoIterator<Item = (i64, Result<A, Error>)>,
) -> Vec<Option<Option<A>>> {
    let mut answers: Vec<_> = std::iter::repeat_with(|| Some(None)).take(count).collect();
    for (question, answer) in found {
        if let Some(place) = usize::try_from(question - 1).ok().and_then(|at| answers.get_mut(at)) {
            *place = answer.ok().map(Some);
        }
    }
    answers
}

fn unanswered() -> Error {
    Error::internal("a statement left a question without an answer")
}

impl<S: Statement> Queue<S> {
    /// As many tasks as there are turns, which live as long as somebody may ask.
    fn start(database: &Database, limit: Duration) -> Self {
        let turns = Arc::new(Semaphore::new(TURNS));
        let (waiting, receiver) = mpsc::channel(MAX_WAITING);
        let receiver = Arc::new(Mutex::new(receiver));
        for _ in 0..TURNS {
            let (database, turns, receiver) = (database.clone(), turns.clone(), receiver.clone());
            tokio::spawn(async move {
                let take_turns =
                    || take_turns(database.clone(), turns.clone(), receiver.clone(), limit);
                // A panic is one batch's, and not the end of all.
                while tokio::spawn(take_turns()).await.is_err() {}
            });
        }
        Self { turns, waiting }
    }
}

async fn take_turns<S: Statement>(
    database: Database,
    turns: Arc<Semaphore>,
    receiver: Arc<Mutex<mpsc::Receiver<Waiting<S>>>>,
    limit: Duration,
) {
    let mut waiting = Vec::with_capacity(MAX_BATCH);
    loop {
        // Nobody else takes questions meanwhile: all that come until it has its turn are its.
        let mut receiver = receiver.lock().await;
        let Some(first) = receiver.recv().await else {
            return;
        };
        let Ok(_turn) = turns.acquire().await else {
            return;
        };
        waiting.push(first);
        while waiting.len() < MAX_BATCH
            && let Ok(next) = receiver.try_recv()
        {
            waiting.push(next);
        }
        drop(receiver);
        answer(&database, waiting.drain(..), limit).await;
    }
}

async fn answer<S: Statement>(
    database: &Database,
    waiting: impl Iterator<Item = Waiting<S>>,
    limit: Duration,
) {
    let waiting = waiting.filter(|waiting| !waiting.caller.answer.is_closed());
    let (questions, callers): (Vec<_>, Vec<_>) =
        waiting.map(|waiting| (waiting.question, waiting.caller)).unzip();
    // What the statement logs stands with the first of those for whom it is.
    let Some(first) = callers.first().map(|caller| caller.call.clone()) else {
        return;
    };
    let answers = database.run(async |connection| match &*questions {
        [one] => Ok(vec![Some(S::one(connection, one).await?)]),
        several => S::many(connection, several).await,
    });
    // Nobody waits for longer.
    let answers = timeout(limit, first.around(answers)).await;
    match answers.unwrap_or(Err(Error::DeadlineExceeded)) {
        Ok(answers) => {
            for ((question, caller), answer) in questions.into_iter().zip(callers).zip(answers) {
                match answer {
                    Some(answer) => caller.tell(Ok(answer)),
                    // Not here, where others would wait for it.
                    None => {
                        drop(tokio::spawn(caller.ask_alone::<S>(
                            database.clone(),
                            question,
                            limit,
                        )));
                    }
                }
            }
        }
        Err(error) => {
            let mut callers = callers.into_iter();
            let first = callers.next();
            callers.for_each(|caller| caller.tell(Err(error.again())));
            if let Some(first) = first {
                first.tell(Err(error));
            }
        }
    }
}

/// A call that waits for an answer.
struct Asker<A> {
    answer: oneshot::Sender<Result<A, Error>>,
    call: CurrentCall,
}

impl<A> Asker<A> {
    fn tell(self, answer: Result<A, Error>) {
        // It may have gone.
        let _ = self.answer.send(answer);
    }

    async fn ask_alone<S: Statement<Answer = A>>(
        mut self,
        database: Database,
        question: S::Question,
        limit: Duration,
    ) {
        let answer = self.call.clone().around(alone::<S>(&database, &question));
        let answer = tokio::select! {
            answer = timeout(limit, answer) => answer,
            () = self.answer.closed() => return,
        };
        self.tell(answer.unwrap_or(Err(Error::DeadlineExceeded)));
    }
}

async fn alone<S: Statement>(
    database: &Database,
    question: &S::Question,
) -> Result<S::Answer, Error> {
    database.run(async |connection| S::one(connection, question).await).await
}
