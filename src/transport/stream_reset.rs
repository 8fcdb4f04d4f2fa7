//! Resets one HTTP/2 stream, while its connection serves others.
//!
//! hyper polls the body of a response only while the flow-control window is open, so a body cannot
//! end a stream that the client does not read. The task of the stream can: when it ends before the
//! response does, h2 discards what is unsent and sends `RST_STREAM`.

use std::{
    cell::RefCell,
    pin::Pin,
    task::{Context, Poll},
};

use hyper::rt::Executor;
use pin_project_lite::pin_project;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

thread_local! {
    /// What the stream that this thread polls has asked for.
    static REQUESTED: RefCell<Option<CancellationToken>> = const { RefCell::new(None) };
}

/// Returns a token that resets the stream whose task calls this, when it is cancelled.
pub(crate) fn reset_token() -> CancellationToken {
    let token = CancellationToken::new();
    REQUESTED.set(Some(token.clone()));
    token
}

/// Spawns the tasks of streams.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamExecutor;

impl<F> Executor<F> for StreamExecutor
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, future: F) {
        tokio::spawn(StreamTask { inner: future, reset: None });
    }
}

pin_project! {
    /// The task of a stream. It costs a unary call nothing but the look at the thread-local.
    struct StreamTask<F> {
        #[pin]
        inner: F,
        reset: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
    }
}

impl<F: Future<Output = ()>> Future for StreamTask<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        // Of a call that was not polled in a task of this module.
        REQUESTED.take();
        let polled = this.inner.poll(context);
        if let Some(token) = REQUESTED.take() {
            *this.reset = Some(Box::pin(token.cancelled_owned()));
        }
        match this.reset {
            Some(reset) if polled.is_pending() => reset.as_mut().poll(context),
            _ => polled,
        }
    }
}
