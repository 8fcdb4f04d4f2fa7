//! Errors: turns them into responses with complete `google.rpc` details, in one place, and logs
//! and counts them.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll, ready},
};

use http::{HeaderMap, HeaderValue, Response};
use http_body::{Body as _, Frame};
use pin_project_lite::pin_project;
use tonic::{Code, Status, body::Body};
use tower::Service;

use super::{Context, call::Call};
use crate::{
    rpc::{
        error::Error,
        status::{complete_error_details, error_of, record_converted},
    },
    telemetry::traces::TraceContext,
    types::error_chain::ErrorChain,
};

#[derive(Clone, Debug)]
pub(super) struct ErrorDetails<S> {
    inner: S,
}

impl<S> ErrorDetails<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
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
        let is_stream = call.is_stream();
        let reporter =
            Reporter { request_id: call.request_id.clone(), context: call.context.clone() };
        ErrorDetailsFuture { inner: self.inner.call(call), reporter: Some(reporter), is_stream }
    }
}

pin_project! {
    pub(super) struct ErrorDetailsFuture<F> {
        #[pin]
        inner: F,
        reporter: Option<Reporter>,
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
        let Some(reporter) = this.reporter.take() else {
            return Poll::Ready(Ok(response));
        };
        if let Some(error) = error_of(&response) {
            reporter.report(error);
            if let Error::Protocol(error) = *error {
                *response.status_mut() = error.http_status(response.headers_mut());
            }
        }
        reporter.complete(response.headers_mut());
        if *this.is_stream && !response.body().is_end_stream() {
            let trace = TraceContext::current();
            response = response.map(|body| {
                Body::new(ErrorDetailsBody { inner: body, error: None, reporter, trace })
            });
        }
        Poll::Ready(Ok(response))
    }
}

/// The body of a stream, which may end with an error.
struct ErrorDetailsBody {
    inner: Body,
    /// The last error of which the handler made a status: an encoded status has no source.
    error: Option<Arc<Error>>,
    reporter: Reporter,
    trace: TraceContext,
}

impl http_body::Body for ErrorDetailsBody {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        let inner = Pin::new(&mut this.inner);
        let mut frame = ready!(record_converted(&mut this.error, || inner.poll_frame(context)));
        if let Some(Ok(frame)) = &mut frame
            && let Some(trailers) = frame.trailers_mut()
            && this.reporter.complete(trailers) != Code::Ok
            && let Some(error) = this.error.take()
        {
            this.trace.enter(|| this.reporter.report(&error));
        }
        Poll::Ready(frame)
    }
}

/// What the errors of a call need.
struct Reporter {
    request_id: HeaderValue,
    context: Arc<Context>,
}

impl Reporter {
    /// Completes the details of an error in headers or trailers, and returns the status code.
    fn complete(&self, headers: &mut HeaderMap) -> Code {
        complete_error_details(headers, self.request_id.to_str().unwrap_or_default())
    }

    /// Logs and counts an error.
    fn report(&self, error: &Error) {
        log(error);
        if matches!(error, Error::Overloaded) {
            self.context.metrics.calls_shed.inc();
        }
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
