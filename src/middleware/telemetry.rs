//! The span of a call, and one log line and the metrics when its response ends. A stream ends
//! with its last message, a unary call when its response is complete.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll, ready},
};

use http::Response;
use http_body_util::BodyExt;
use pin_project_lite::pin_project;
use tokio::time::Instant;
use tonic::{Code, body::Body};
use tower::Service;
use tracing::{Instrument, field, instrument::Instrumented};

use super::call::Call;
use crate::{
    rpc::{
        open_stream::{OpenStream, Sent},
        status::status_code,
    },
    telemetry::{
        metrics::{self, GaugeGuard, MethodMetrics},
        traces::{self, CallSpan, InContext},
    },
};

/// The longest method name in the log, in bytes. The path of an unknown method may be as long as
/// the metadata.
///
/// Test: `a_long_method_name_is_truncated_in_the_log`.
const MAX_METHOD_LEN: usize = 128;

#[derive(Clone, Debug)]
pub(super) struct Telemetry<S> {
    inner: S,
}

impl<S> Telemetry<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

/// Starts the span of a call.
fn start(call: &Call) -> (CallRecorder, tracing::Span) {
    let path = call.request.uri().path();
    let is_system = call.method.is_some_and(|method| method.system.is_some());
    let metrics = call.context.metrics.calls.get(path).clone();
    metrics.start();
    let id = call.request_id.to_str().unwrap_or_default();
    let parent = traces::remote_parent(call.request.headers());
    let parent_span_id = parent.as_ref().map(|parent| field::display(parent.span_id()));
    let call_span = call.context.tracer.start(metrics.name(), id, parent, is_system);
    // At the level of errors, so that each line of the call has its fields at every level.
    let span = tracing::error_span!(
        "call",
        method = method_name(path),
        request_id = id,
        parent_span_id,
        trace_id = %call_span.trace_id(),
        client_ip = %call.client_ip,
        user_id = field::Empty,
        session_id = field::Empty,
        personal_access_token_id = field::Empty,
    );
    let recorder = CallRecorder {
        started_at: call.received_at,
        is_system,
        metrics,
        call_span,
        span: span.clone(),
        code: Code::Cancelled,
        stream: call.open_stream.clone(),
        _in_flight: (call.open_stream.is_none())
            .then(|| GaugeGuard::new(&call.context.metrics.calls_in_flight)),
    };
    (recorder, span)
}

impl<S> Service<Call> for Telemetry<S>
where
    S: Service<Call, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = TelemetryFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        let (recorder, span) = start(&call);
        let is_stream = call.is_stream();
        // The layers below reject a call here, and log in its span.
        let inner = span.in_scope(|| self.inner.call(call));
        let inner = recorder.call_span.in_context(inner).instrument(span);
        TelemetryFuture { inner, recorder: Some(recorder), is_stream }
    }
}

pin_project! {
    pub(super) struct TelemetryFuture<F> {
        #[pin]
        inner: Instrumented<InContext<F>>,
        recorder: Option<CallRecorder>,
        is_stream: bool,
    }
}

impl<F> Future for TelemetryFuture<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Ok(response) = ready!(this.inner.poll(context));
        let Some(mut recorder) = this.recorder.take() else {
            return Poll::Ready(Ok(response));
        };
        let code = status_code(response.headers());
        if code.is_some() || !*this.is_stream {
            recorder.set_code(code.unwrap_or(Code::Ok));
            return Poll::Ready(Ok(response));
        }
        // The recorder lives as long as the body.
        let response = response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                if let Some(trailers) = frame.trailers_ref() {
                    recorder.set_code(status_code(trailers).unwrap_or(Code::Unknown));
                }
                frame
            }))
        });
        Poll::Ready(Ok(response))
    }
}

/// Returns the name of a method in the log.
fn method_name(path: &str) -> &str {
    let name = path.strip_prefix('/').unwrap_or(path);
    &name[..name.floor_char_boundary(MAX_METHOD_LEN)]
}

/// Writes the log line, updates the metrics and ends the span on drop, however the call ends: a
/// client that disconnects drops it.
struct CallRecorder {
    started_at: Instant,
    is_system: bool,
    metrics: Arc<MethodMetrics>,
    call_span: CallSpan,
    span: tracing::Span,
    /// The status, CANCELLED until the response ends.
    code: Code,
    stream: Option<OpenStream>,
    /// `None` for a stream of the API, which may be open for as long as its connection.
    _in_flight: Option<GaugeGuard>,
}

impl CallRecorder {
    /// A method, so that a closure captures the whole recorder, and not a copy of the field.
    fn set_code(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for CallRecorder {
    fn drop(&mut self) {
        let duration = self.started_at.elapsed();
        // Whole microseconds.
        let duration_ms = (duration.as_secs_f64() * 1e6).round() / 1e3;
        let code = metrics::code_name(self.code);
        self.metrics.observe(self.code, duration);
        self.call_span.end(self.code, code);
        let _entered = self.span.enter();
        // Probes come every few seconds.
        if self.is_system {
            tracing::debug!(code, duration_ms, "call");
        } else if let Some(stream) = &self.stream {
            let Sent { messages, changes, bytes } = stream.sent();
            let reason = stream.reason();
            tracing::info!(code, duration_ms, messages, changes, bytes, reason, "call");
        } else {
            tracing::info!(code, duration_ms, "call");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_method_name_is_truncated_in_the_log() {
        for (path, name) in [
            ("/fastzero.todo.v1.TodoService/GetTodo", "fastzero.todo.v1.TodoService/GetTodo"),
            (&format!("/{}", "a".repeat(129)), &"a".repeat(128)),
            (&format!("/a{}", "é".repeat(64)), &format!("a{}", "é".repeat(63))),
        ] {
            assert_eq!(method_name(path), name);
        }
    }
}
