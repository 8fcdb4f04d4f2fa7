//! Traces: the trace of each call, and, where there is a collector, a span of the call and
//! spans of its work on the database, exported over OTLP.
//!
//! The spans are the SDK's own, not those of `tracing-opentelemetry`: with a collector, that
//! layer adds 24,000 instructions to a GetTodo of 170,000 (user space, without the export), and
//! these spans 7,000.

mod remote_parent;

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::Uri;
use opentelemetry::{
    Context, Key, KeyValue,
    context::{FutureExt, WithContext},
    trace::{
        Span, SpanContext, SpanKind, Status as SpanStatus, TraceContextExt, TraceId, Tracer,
        TracerProvider,
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

pub(crate) use self::remote_parent::remote_parent;

/// The service name of the spans, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES`
/// sets another.
const SERVICE_NAME: &str = "fast-zero";

/// How long opening a connection to the collector may take.
///
/// Test: `an_export_waits_for_a_connection_for_five_seconds`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the collector may take for a batch: OTLP's default.
///
/// Test: `an_export_waits_for_the_collector_for_ten_seconds`.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an export waits before it pings the collector, and how long for the response to the
/// ping: together less than [`EXPORT_TIMEOUT`], so that the next export opens a new connection if a
/// firewall or a failover broke this one.
///
/// Test: `an_export_after_one_without_a_response_opens_a_new_connection`.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(4);
/// See [`KEEPALIVE_INTERVAL`].
///
/// Test: `an_export_after_one_without_a_response_opens_a_new_connection`.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(4);

/// How long the shutdown waits for the collector to take the last spans.
///
/// Test: `an_unavailable_or_silent_collector_delays_neither_calls_nor_shutdown`.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Starts the spans of calls, and exports them if there is a collector.
#[derive(Clone, Debug)]
pub(crate) struct CallTracer(Option<Export>);

#[derive(Clone, Debug)]
struct Export {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
}

impl CallTracer {
    /// Creates a tracer that exports to the collector, if there is one. Needs a runtime, and
    /// does not wait for the connection.
    pub(crate) fn new(collector: Option<Channel>) -> Result<Self, BoxError> {
        let Some(collector) = collector else {
            return Ok(Self(None));
        };
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_channel(collector)
            .with_timeout(EXPORT_TIMEOUT)
            .build()?;
        // The batch exporter has a thread of its own, and drops what it cannot export in time.
        let provider = SdkTracerProvider::builder()
            .with_resource(resource())
            .with_batch_exporter(LoggingExporter { exporter, failing: AtomicBool::new(false) })
            .build();
        Ok(Self(Some(Export { tracer: provider.tracer(SERVICE_NAME), provider })))
    }

    /// Starts the span of a call in the client's trace, or in a new one.
    ///
    /// The span of a probe is exported only if the client's is: probes come every few seconds.
    #[must_use]
    pub(crate) fn start(
        &self,
        method: &str,
        request_id: &str,
        parent: Option<SpanContext>,
        is_system: bool,
    ) -> CallSpan {
        let is_sampled = parent.as_ref().is_some_and(SpanContext::is_sampled);
        let Some(export) = self.0.as_ref().filter(|_| is_sampled || !is_system) else {
            let id = parent.as_ref().map(SpanContext::trace_id);
            let trace_id = id.unwrap_or_else(|| RandomIdGenerator::default().new_trace_id());
            return CallSpan { trace_id, context: None };
        };
        let parent = parent.map(|parent| Context::new().with_remote_span_context(parent));
        let span = export
            .tracer
            .span_builder(method.to_owned())
            .with_kind(SpanKind::Server)
            .with_attributes(attributes(method, request_id))
            .start_with_context(&export.tracer, &parent.unwrap_or_default());
        let trace_id = span.span_context().trace_id();
        // A span that is not sampled has no children to export.
        let context = span
            .is_recording()
            .then(|| Context::new().with_value(export.tracer.clone()).with_span(span));
        CallSpan { trace_id, context }
    }

    /// Exports the last spans, for at most [`FLUSH_TIMEOUT`] and `timeout`.
    pub(crate) async fn shut_down(self, timeout: Duration) {
        let Some(Export { provider, .. }) = self.0 else {
            return;
        };
        let timeout = timeout.min(FLUSH_TIMEOUT);
        let flush = move || provider.shutdown_with_timeout(timeout);
        if !matches!(tokio::task::spawn_blocking(flush).await, Ok(Ok(()))) {
            tracing::warn!("span flush timed out, spans may be lost");
        }
    }
}

/// Returns the attributes of a call's span (OpenTelemetry's semantic conventions for RPC).
fn attributes(method: &str, request_id: &str) -> Vec<KeyValue> {
    vec![
        KeyValue::new("rpc.system.name", "grpc"),
        KeyValue::new("rpc.method", method.to_owned()),
        KeyValue::new("request_id", request_id.to_owned()),
    ]
}

/// Returns the attributes of the process.
fn resource() -> Resource {
    let detected = Resource::builder().build().get(&Key::new("service.name"));
    let has_name = detected.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
    let resource = Resource::builder().with_attribute(version);
    if has_name { resource } else { resource.with_service_name(SERVICE_NAME) }.build()
}

/// Returns the endpoint of a collector, with the timeouts of the export.
pub(crate) fn collector_endpoint(collector: &Uri) -> Endpoint {
    Endpoint::from(collector.clone())
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(EXPORT_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
}

/// Logs when the export starts to fail and when it recovers, but not each batch.
#[derive(Debug)]
struct LoggingExporter {
    exporter: opentelemetry_otlp::SpanExporter,
    failing: AtomicBool,
}

impl SpanExporter for LoggingExporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.exporter.export(batch).await;
        let was_failing = self.failing.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(error) if !was_failing => tracing::warn!(%error, "span export failed"),
            Ok(()) if was_failing => tracing::info!("span export recovered"),
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

/// Work that runs as part of a call.
pub(crate) type InContext<F> = WithContext<F>;

/// The span of a call.
#[derive(Clone, Debug)]
pub(crate) struct CallSpan {
    trace_id: TraceId,
    /// Contains the span, if it is sampled.
    context: Option<Context>,
}

impl CallSpan {
    /// Returns the trace id: 32 hexadecimal digits.
    #[must_use]
    pub(crate) fn trace_id(&self) -> impl fmt::Display {
        self.trace_id
    }

    /// Runs work whose spans are children of the call's.
    pub(crate) fn in_context<F>(&self, work: F) -> InContext<F> {
        work.with_context(self.context.clone().unwrap_or_default())
    }

    /// Ends the span with the call's status.
    pub(crate) fn end(&self, code: Code, code_name: &'static str) {
        let Some(context) = &self.context else {
            return;
        };
        let span = context.span();
        span.set_attribute(KeyValue::new("rpc.response.status_code", code_name));
        if is_server_error(code) {
            span.set_status(SpanStatus::error(""));
        }
        span.end();
    }
}

/// Returns `true` if the status is an error of the server (OpenTelemetry's semantic
/// conventions for gRPC).
fn is_server_error(code: Code) -> bool {
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

/// Records the caller in the span of the call.
pub(crate) fn record_user_id(id: impl fmt::Display) {
    Context::map_current(|context| {
        let span = context.span();
        if span.is_recording() {
            span.set_attribute(KeyValue::new("user.id", id.to_string()));
        }
    });
}

/// The spans of a call, for work that continues in another task.
#[derive(Clone, Debug)]
pub(crate) struct TraceContext {
    context: Context,
    span: tracing::Span,
}

impl TraceContext {
    /// Returns the spans of the current task.
    #[must_use]
    pub(crate) fn current() -> Self {
        Self { context: Context::current(), span: tracing::Span::current() }
    }

    /// Runs work as part of the call.
    pub(crate) fn in_context<F: Future>(self, work: F) -> impl Future<Output = F::Output> + use<F> {
        work.with_context(self.context).instrument(self.span)
    }

    /// Runs synchronous work as part of the call.
    pub(crate) fn enter<T>(&self, work: impl FnOnce() -> T) -> T {
        let _context = self.context.clone().attach();
        self.span.in_scope(work)
    }
}

/// The span of some work on the database, if the call is sampled. The span ends on drop.
#[derive(Debug)]
pub(crate) struct DatabaseSpan(Option<Context>);

impl DatabaseSpan {
    /// Starts the span.
    #[must_use]
    pub(crate) fn start() -> Self {
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
    pub(crate) fn record_error(&self) {
        if let Some(context) = &self.0 {
            context.span().set_status(SpanStatus::error(""));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::pending, net::SocketAddr};

    use http::Response;
    use hyper::{server::conn::http2, service::service_fn};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::{
        net::{TcpListener, TcpSocket, TcpStream},
        time::{Instant, timeout},
    };
    use tonic::body::Body;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;

    /// Returns for how many seconds a call waits for the collector at an address.
    async fn seconds_until_call_fails(address: SocketAddr) -> f64 {
        let uri = format!("http://{address}").parse().expect("a URI");
        let mut client = HealthClient::new(collector_endpoint(&uri).connect_lazy());
        let started = Instant::now();
        let check = client.check(HealthCheckRequest::default());
        let response = timeout(Duration::from_hours(1), check).await;
        response.expect("it gives up").expect_err("the collector does not respond");
        started.elapsed().as_secs_f64().round()
    }

    #[tokio::test(start_paused = true)]
    async fn an_export_waits_for_the_collector_for_ten_seconds() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        // It answers pings, and no call.
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("a connection");
            let service = service_fn(|_| pending::<Result<Response<Body>, Infallible>>());
            let server = http2::Builder::new(TokioExecutor::new());
            server.serve_connection(TokioIo::new(stream), service).await
        });
        let seconds = seconds_until_call_fails(address).await;
        assert!((seconds - 10.0).abs() < 1.0, "{seconds}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_export_after_one_without_a_response_opens_a_new_connection() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        silent.set_nonblocking(true).expect("it is a socket");
        let address = silent.local_addr().expect("a bound port");
        let uri = format!("http://{address}").parse().expect("a URI");
        let mut client = HealthClient::new(collector_endpoint(&uri).connect_lazy());
        for _ in 0..2 {
            client.check(HealthCheckRequest::default()).await.expect_err("no response");
        }
        let connections = std::iter::from_fn(|| silent.accept().ok()).count();
        assert_eq!(connections, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_export_waits_for_a_connection_for_five_seconds() {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        let full = socket.listen(1).expect("it listens");
        let address = full.local_addr().expect("a bound port");
        // The kernel accepts connections until the backlog is full.
        let mut backlog = Vec::new();
        while let Ok(Ok(stream)) =
            timeout(Duration::from_secs(1), TcpStream::connect(address)).await
        {
            backlog.push(stream);
        }
        let seconds = seconds_until_call_fails(address).await;
        assert!((seconds - 5.0).abs() < 1.0, "{seconds}");
    }
}
