//! The deadline of a call: the client's `grpc-timeout` or the default, whichever is shorter. It
//! counts from the arrival of the headers, and covers the whole of a unary call. For a stream it
//! covers the time until the response headers; the stream layer ends the stream at the client's
//! own deadline.

use std::{
    pin::Pin,
    task::{Context as TaskContext, Poll, ready},
};

use http::Response;
use pin_project_lite::pin_project;
use tokio::time::{Timeout, timeout_at};
use tonic::body::Body;
use tower::Service;

use super::call::Call;
use crate::rpc::error::Error;

#[derive(Clone, Debug)]
pub(super) struct Deadline<S> {
    inner: S,
}

impl<S> Deadline<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Call> for Deadline<S>
where
    S: Service<Call, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = DeadlineFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let deadline = call.deadline();
        DeadlineFuture { inner: timeout_at(deadline, self.inner.call(call)) }
    }
}

pin_project! {
    pub(super) struct DeadlineFuture<F> {
        #[pin]
        inner: Timeout<F>,
    }
}

impl<F> Future for DeadlineFuture<F>
where
    F: Future<Output = Result<Response<Body>, Error>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let result = ready!(self.project().inner.poll(context));
        Poll::Ready(result.unwrap_or(Err(Error::DeadlineExceeded)))
    }
}
