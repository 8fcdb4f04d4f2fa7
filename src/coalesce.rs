//! One statement for what several calls ask at once.
//!
//! A few tasks take turns: each answers all questions that wait, by one statement, while
//! new ones gather. So a call that is alone is answered at once, by the statement that asks
//! for it alone, and the busier the service, the more calls share a statement, its round
//! trip and, where it writes, its commit.

use std::{fmt, sync::Arc};

use sqlx::PgConnection;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::timeout,
};

use crate::{call::DEFAULT_DEADLINE, database::Database, error::Error, traces::CurrentCall};

/// Statements of one kind under way at once: one runs while the answers of the other are
/// on their way.
const TASKS: usize = 2;

/// Questions in one statement. More make those that come first wait for the others, and
/// save hardly anything.
const MAX_BATCH: usize = 32;

/// Questions that wait, at the most: callers wait for their turn then.
const MAX_WAITING: usize = 1_024;

/// A statement that answers many questions of a kind.
pub trait Statement: fmt::Debug + 'static {
    /// What one call asks.
    type Question: Send + Sync + 'static;
    /// What it is answered.
    type Answer: Send + 'static;

    /// Answers one question, or several at once; in their order.
    fn run(
        connection: &mut PgConnection,
        questions: &[Self::Question],
    ) -> impl Future<Output = Result<Vec<Self::Answer>, Error>> + Send;

    /// Whether only some of several questions are the reason for this error, and nothing
    /// is done for the others: each is asked alone then.
    #[must_use]
    fn concerns_some(_: &Error) -> bool {
        false
    }
}

/// Asks a statement, together with whoever else does.
pub struct Coalescer<S: Statement> {
    database: Database,
    /// `None`: each asks alone.
    waiting: Option<mpsc::Sender<Waiting<S>>>,
}

struct Waiting<S: Statement> {
    question: S::Question,
    answer: oneshot::Sender<Result<S::Answer, Error>>,
    call: CurrentCall,
}

impl<S: Statement> fmt::Debug for Coalescer<S> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Coalescer").finish_non_exhaustive()
    }
}

impl<S: Statement> Coalescer<S> {
    /// Has questions asked together, or, where one statement must not be about several
    /// owners, each alone.
    #[must_use]
    pub fn new(database: Database, together: bool) -> Self {
        let waiting = together.then(|| start(&database));
        Self { database, waiting }
    }

    /// Asks. A call that is dropped before its turn asks nothing.
    pub async fn ask(&self, question: S::Question) -> Result<S::Answer, Error> {
        let Some(waiting) = &self.waiting else {
            return alone::<S>(&self.database, question).await;
        };
        let (answer, answered) = oneshot::channel();
        let question = Waiting { question, answer, call: CurrentCall::get() };
        waiting.send(question).await.map_err(|_| unanswered())?;
        answered.await.map_err(|_| unanswered())?
    }
}

/// Brings what was found into the order of `count` questions; `None` where nothing was.
/// Questions are counted from 1, as `with ordinality` does.
pub fn in_order<A>(
    count: usize,
    found: impl IntoIterator<Item = Result<(i64, A), Error>>,
) -> Result<Vec<Option<A>>, Error> {
    let mut answers: Vec<_> = std::iter::repeat_with(|| None).take(count).collect();
    for found in found {
        let (question, answer) = found?;
        let place = usize::try_from(question - 1).ok().and_then(|at| answers.get_mut(at));
        *place.ok_or_else(|| Error::internal("an answer without a question"))? = Some(answer);
    }
    Ok(answers)
}

fn unanswered() -> Error {
    Error::internal("a statement left a question without an answer")
}

/// The tasks live as long as somebody may ask.
fn start<S: Statement>(database: &Database) -> mpsc::Sender<Waiting<S>> {
    let (sender, receiver) = mpsc::channel(MAX_WAITING);
    let receiver = Arc::new(Mutex::new(receiver));
    for _ in 0..TASKS {
        tokio::spawn(take_turns(database.clone(), receiver.clone()));
    }
    sender
}

async fn take_turns<S: Statement>(
    database: Database,
    receiver: Arc<Mutex<mpsc::Receiver<Waiting<S>>>>,
) {
    let mut waiting = Vec::with_capacity(MAX_BATCH);
    while receiver.lock().await.recv_many(&mut waiting, MAX_BATCH).await > 0 {
        answer(&database, waiting.drain(..)).await;
    }
}

async fn answer<S: Statement>(database: &Database, waiting: impl Iterator<Item = Waiting<S>>) {
    let waiting = waiting.filter(|waiting| !waiting.answer.is_closed());
    let mut call = None;
    let (questions, callers): (Vec<_>, Vec<_>) = waiting
        .map(|waiting| {
            call.get_or_insert(waiting.call);
            (waiting.question, waiting.answer)
        })
        .unzip();
    // What the statement logs stands with one of those for whom it is.
    let Some(call) = call else { return };
    let answers = database.run(async |connection| S::run(connection, &questions).await);
    // Nobody waits for longer.
    let answers = timeout(DEFAULT_DEADLINE, call.around(answers)).await;
    match answers.unwrap_or(Err(Error::DeadlineExceeded)) {
        // Who has gone meanwhile hears nothing of it.
        Ok(answers) => callers.into_iter().zip(answers).for_each(|(caller, answer)| {
            let _ = caller.send(Ok(answer));
        }),
        Err(error) if S::concerns_some(&error) && callers.len() > 1 => {
            for (question, caller) in questions.into_iter().zip(callers) {
                let _ = caller.send(alone::<S>(database, question).await);
            }
        }
        Err(error) => callers.into_iter().for_each(|caller| {
            let _ = caller.send(Err(error.again()));
        }),
    }
}

async fn alone<S: Statement>(
    database: &Database,
    question: S::Question,
) -> Result<S::Answer, Error> {
    let questions = [question];
    let answers = database.run(async |connection| S::run(connection, &questions).await);
    answers.await?.pop().ok_or_else(unanswered)
}
