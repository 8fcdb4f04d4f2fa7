//! Traces: the one that each call is part of, and, where there is a collector, a span of the
//! call and spans of its work on the database, exported over OTLP.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::Uri;
use opentelemetry::{
    Context, Key, KeyValue,
    context::FutureExt,
    trace::{
        Span, SpanContext, SpanId, SpanKind, Status as SpanStatus, TraceContextExt, TraceFlags,
        TraceId, TraceState, Tracer, TracerProvider,
    },
};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{IdGenerator, RandomIdGenerator, SdkTracer, SdkTracerProvider, SpanData, SpanExporter},
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tracing::Instrument;

use crate::types::error_chain::BoxError;

/// What the spans' service is called, unless `OTEL_SERVICE_NAME` or
/// `OTEL_RESOURCE_ATTRIBUTES` says otherwise.
const SERVICE_NAME: &str = "fast-zero";

/// How long a connection to the collector may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the collector may take for a batch: OTLP's default.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the stop waits for the collector to take what is left.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest `tracestate` that is passed on, in bytes: what W3C's Trace Context asks for.
/// Each span that waits to be exported holds it.
const MAX_TRACE_STATE_LENGTH: usize = 512;

/// The span of the caller that a call is made in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallerSpan<'a> {
    /// The trace.
    pub trace_id: u128,
    /// The span.
    pub span_id: u64,
    /// Whether the caller records it.
    pub sampled: bool,
    /// What others than the caller note of the trace (`tracestate`), for those who know
    /// them.
    pub state: &'a str,
}

impl From<CallerSpan<'_>> for SpanContext {
    fn from(span: CallerSpan<'_>) -> Self {
        let state = Some(span.state).filter(|state| state.len() <= MAX_TRACE_STATE_LENGTH);
        Self::new(
            TraceId::from(span.trace_id),
            SpanId::from(span.span_id),
            TraceFlags::default().with_sampled(span.sampled),
            true,
            state.and_then(|state| state.parse().ok()).unwrap_or(TraceState::NONE),
        )
    }
}

/// Makes the traces of calls, and exports them if there is a collector.
#[derive(Clone, Debug)]
pub struct Traces(Option<Export>);

#[derive(Clone, Debug)]
struct Export {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
}

impl Traces {
    /// Starts to export to this collector, if there is one. Needs a runtime, and does not
    /// wait.
    pub fn start(collector: Option<Channel>) -> Result<Self, BoxError> {
        let Some(collector) = collector else {
            return Ok(Self(None));
        };
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_channel(collector)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        // In a thread of its own, and dropping what the collector does not take in time.
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_batch_exporter(Reported { exporter, failing: AtomicBool::new(false) })
            .build();
        Ok(Self(Some(Export { tracer: provider.tracer(SERVICE_NAME), provider })))
    }

    /// Begins the trace of a call, or goes on with the caller's. One `of_probe` is exported
    /// only where the caller records it: probes come every few seconds, for ever.
    #[must_use]
    pub fn begin(
        &self,
        method: &str,
        request_id: &str,
        caller: Option<CallerSpan<'_>>,
        of_probe: bool,
    ) -> CallTrace {
        let recorded = caller.is_some_and(|caller| caller.sampled);
        let Some(export) = self.0.as_ref().filter(|_| recorded || !of_probe) else {
            let id = caller.map(|caller| TraceId::from(caller.trace_id));
            let id = id.unwrap_or_else(|| RandomIdGenerator::default().new_trace_id());
            return CallTrace { id, context: None };
        };
        let parent = caller.map(|caller| Context::new().with_remote_span_context(caller.into()));
        let span = export
            .tracer
            .span_builder(method.to_owned())
            .with_kind(SpanKind::Server)
            .with_attributes(attributes(method, request_id))
            .start_with_context(&export.tracer, &parent.unwrap_or_default());
        let id = span.span_context().trace_id();
        // What nobody records is not carried around.
        let context = span
            .is_recording()
            .then(|| Context::new().with_value(export.tracer.clone()).with_span(span));
        CallTrace { id, context }
    }

    /// Exports what is left, for 2 seconds at the most, and no longer than `limit`.
    pub async fn stop(self, limit: Duration) {
        let Some(Export { provider, .. }) = self.0 else {
            return;
        };
        let limit = limit.min(FLUSH_TIMEOUT);
        let flush = move || provider.shutdown_with_timeout(limit);
        if !matches!(tokio::task::spawn_blocking(flush).await, Ok(Ok(()))) {
            tracing::warn!("the last traces may be lost: the collector did not take them in time");
        }
    }
}

/// The semantic conventions' for calls.
fn attributes(method: &str, request_id: &str) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("rpc.system", "grpc"),
        KeyValue::new("request_id", request_id.to_owned()),
    ];
    if let Some((service, method)) = method.split_once('/') {
        attributes.push(KeyValue::new("rpc.service", service.to_owned()));
        attributes.push(KeyValue::new("rpc.method", method.to_owned()));
    }
    attributes
}

/// Where the spans come from.
fn resource() -> Resource {
    let detected = Resource::builder().build().get(&Key::new("service.name"));
    let has_name = detected.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    if has_name { resource } else { resource.with_service_name(SERVICE_NAME) }.build()
}

/// Returns the endpoint of a collector, with the timeouts of the export.
pub fn endpoint(collector: &Uri) -> Endpoint {
    Endpoint::from(collector.clone()).connect_timeout(CONNECT_TIMEOUT).timeout(EXPORT_TIMEOUT)
}

/// Tells when the export begins to fail, and when it works again: not for every batch.
#[derive(Debug)]
struct Reported {
    exporter: opentelemetry_otlp::SpanExporter,
    failing: AtomicBool,
}

impl SpanExporter for Reported {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        let was_failing = self.failing.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(cause) if !was_failing => tracing::warn!(%cause, "traces cannot be exported"),
            Ok(()) if was_failing => tracing::info!("traces are exported again"),
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// The trace of a call.
#[derive(Clone, Debug)]
pub struct CallTrace {
    id: TraceId,
    /// With the span of the call, if it is recorded.
    context: Option<Context>,
}

impl CallTrace {
    /// The id of the trace: 32 hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> impl fmt::Display {
        self.id
    }

    /// What this work does is part of the call.
    pub fn around<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        work.with_context(self.context.clone().unwrap_or_default())
    }

    /// The call has ended in this way.
    pub fn end(&self, code: Code) {
        let Some(context) = &self.context else {
            return;
        };
        let span = context.span();
        span.set_attribute(KeyValue::new("rpc.grpc.status_code", i64::from(code as i32)));
        if is_fault(code) {
            span.set_status(SpanStatus::error(""));
        }
        span.end();
    }
}

/// Whether a call that ends so is a failure of the server, and not of its caller.
fn is_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

/// Notes in the span of the call who makes it.
pub fn note_user(id: impl fmt::Display) {
    Context::map_current(|context| {
        let span = context.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new("user.id", id.to_string()));
        }
    });
}

/// The call that something is done for: what is logged and traced meanwhile stands with it,
/// even where it goes on without the call.
#[derive(Clone, Debug)]
pub struct CurrentCall {
    context: Context,
    span: tracing::Span,
}

impl CurrentCall {
    /// The one that is under way here.
    #[must_use]
    pub fn get() -> Self {
        Self { context: Context::current(), span: tracing::Span::current() }
    }

    /// What this work does is part of the call.
    pub fn around<F: Future>(self, work: F) -> impl Future<Output = F::Output> + use<F> {
        work.with_context(self.context).instrument(self.span)
    }
}

/// The span of some work on the database, if its call is recorded; it ends when this is
/// dropped.
#[derive(Debug)]
pub struct DatabaseSpan(Option<Context>);

impl DatabaseSpan {
    /// Begins it.
    #[must_use]
    pub fn begin() -> Self {
        Self(Context::map_current(|context| {
            let tracer = context.get::<SdkTracer>()?;
            let span = tracer
                .span_builder("postgresql")
                .with_kind(SpanKind::Client)
                .with_attributes([KeyValue::new("db.system.name", "postgresql")])
                .start_with_context(tracer, context);
            Some(Context::new().with_span(span))
        }))
    }

    /// Records that the work failed.
    pub fn record_error(&self) {
        if let Some(context) = &self.0 {
            context.span().set_status(SpanStatus::error(""));
        }
    }
}
