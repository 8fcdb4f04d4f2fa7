//! Errors: turns them into responses with complete `google.rpc` details, in one place, and logs
//! and counts them.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll, ready},
};

use http::{HeaderValue, Response};
use http_body_util::BodyExt;
use pin_project_lite::pin_project;
use tonic::{Status, body::Body};
use tower::Service;

use super::{Context, call::Call};
use crate::{
    rpc::error::{self, Error},
    telemetry::metrics::Counter,
    types::error_chain::ErrorChain,
};

#[derive(Clone, Debug)]
pub(super) struct ErrorDetails<S> {
    inner: S,
    calls_shed: Counter,
}

impl<S> ErrorDetails<S> {
    #[expect(clippy::needless_pass_by_value, reason = "as the other layers")]
    pub(super) fn new(inner: S, context: Arc<Context>) -> Self {
        Self { inner, calls_shed: context.metrics.calls_shed.clone() }
    }
}

impl<S> Service<Call> for ErrorDetails<S>
where
    S: Service<Call, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ErrorDetailsFuture<S::Future>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        // No layer below has backpressure of its own: load shedding rejects instead.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let (request_id, calls_shed) = (call.request_id.clone(), self.calls_shed.clone());
        let is_stream = call.is_stream();
        ErrorDetailsFuture { inner: self.inner.call(call), request_id, calls_shed, is_stream }
    }
}

pin_project! {
    pub(super) struct ErrorDetailsFuture<F> {
        #[pin]
        inner: F,
        request_id: HeaderValue,
        calls_shed: Counter,
        is_stream: bool,
    }
}

impl<F> Future for ErrorDetailsFuture<F>
where
    F: Future<Output = Result<Response<Body>, Error>>,
{
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(context));
        let mut response = response.unwrap_or_else(|error| Status::from(error).into_http());
        if let Some(error) = error::error_of(&response) {
            log(error);
            if matches!(error, Error::Overloaded) {
                this.calls_shed.inc();
            }
        }
        let id = this.request_id.to_str().unwrap_or_default();
        error::complete_error_details(response.headers_mut(), id);
        if *this.is_stream {
            let id = id.to_owned();
            response = response.map(|body| {
                Body::new(body.map_frame(move |mut frame| {
                    if let Some(trailers) = frame.trailers_mut() {
                        error::complete_error_details(trailers, &id);
                    }
                    frame
                }))
            });
        }
        Poll::Ready(Ok(response))
    }
}

/// Logs the source of an error that is no client's fault. The client does not get it.
fn log(error: &Error) {
    match error {
        error if error.is_duplicate() => {}
        Error::Internal(source) => {
            tracing::error!(error = %ErrorChain(&**source), "internal error");
        }
        Error::DatabaseUnavailable(source) => {
            tracing::warn!(error = %ErrorChain(&**source), "database unavailable");
        }
        _ => {}
    }
}
