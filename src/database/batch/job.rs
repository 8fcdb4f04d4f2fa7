//! A query that waits, and the call that waits for it.

use tokio::sync::oneshot;

use super::BatchQuery;
use crate::{rpc::error::Error, telemetry::traces::TraceContext};

/// A queued query.
pub(super) struct Job<Q: BatchQuery> {
    pub(super) input: Q::Input,
    pub(super) responder: Responder<Q::Output>,
    /// Whether the query runs without others: a statement with others left it undone.
    pub(super) runs_alone: bool,
}

impl<Q: BatchQuery> Job<Q> {
    pub(super) fn new(input: Q::Input, responder: Responder<Q::Output>) -> Self {
        Self { input, responder, runs_alone: false }
    }

    /// Returns `true` if the call was dropped.
    pub(super) fn is_dropped(&self) -> bool {
        self.responder.sender.is_closed()
    }
}

/// Sends the result to the call that waits for it.
pub(super) struct Responder<T> {
    pub(super) sender: oneshot::Sender<Result<T, Error>>,
    pub(super) trace: TraceContext,
}

impl<T> Responder<T> {
    pub(super) fn send(self, output: Result<T, Error>) {
        // Fails if the call was dropped.
        let _ = self.sender.send(output);
    }
}
