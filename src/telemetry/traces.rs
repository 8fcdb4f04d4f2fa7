//! Traces: the trace of each call, and, where there is a collector, a span of the call and
//! spans of its work on the database, exported over OTLP.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::{HeaderMap, Uri};
use opentelemetry::{
    Context, Key, KeyValue,
    context::{FutureExt, WithContext},
    propagation::{Extractor, TextMapPropagator},
    trace::{
        Span, SpanContext, SpanKind, Status as SpanStatus, TraceContextExt, TraceId, Tracer,
        TracerProvider,
    },
};
use opentelemetry_otlp::{WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    propagation::TraceContextPropagator,
    trace::{IdGenerator, RandomIdGenerator, SdkTracer, SdkTracerProvider, SpanData, SpanExporter},
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tracing::Instrument;

use crate::types::error_chain::BoxError;

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

/// How long the shutdown waits for the collector to take the last spans.
///
/// Test: `a_collector_that_is_away_or_silent_holds_neither_calls_nor_the_stop`.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest `tracestate` that is propagated, in bytes: what W3C Trace Context (section
/// 3.3.1.5) asks for. Each span that waits for its export holds it.
///
/// Test: `a_tracestate_is_propagated_up_to_its_maximum_length`.
const MAX_TRACESTATE_BYTES: usize = 512;

/// The metadata entries of W3C Trace Context.
const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// Returns the client's span, if the metadata contains exactly one well-formed `traceparent`
/// (W3C Trace Context, section 3.2).
#[must_use]
pub(crate) fn remote_parent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    // The propagator also takes ids of other lengths, signs, and no flags.
    if !is_well_formed(value.to_str().ok()?) {
        return None;
    }
    let context = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &HeaderExtractor(headers));
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

/// Returns `true` if the first four fields have their lengths, in lowercase hexadecimal
/// digits. Later versions may add fields.
fn is_well_formed(traceparent: &str) -> bool {
    let mut fields = traceparent.split('-');
    let is_hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let is_field = |field: &str, len: usize| field.len() == len && field.bytes().all(is_hex);
    let has_fields = [2, 32, 16, 2]
        .into_iter()
        .all(|len| fields.next().is_some_and(|field| is_field(field, len)));
    has_fields && (!traceparent.starts_with("00") || fields.next().is_none())
}

struct HeaderExtractor<'a>(&'a HeaderMap);

impl Extractor for HeaderExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let value = self.0.get(key)?.to_str().ok()?;
        (key != TRACESTATE || value.len() <= MAX_TRACESTATE_BYTES).then_some(value)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

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
        is_probe: bool,
    ) -> CallSpan {
        let is_sampled = parent.as_ref().is_some_and(SpanContext::is_sampled);
        let Some(export) = self.0.as_ref().filter(|_| is_sampled || !is_probe) else {
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
    Endpoint::from(collector.clone()).connect_timeout(CONNECT_TIMEOUT).timeout(EXPORT_TIMEOUT)
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
    use std::net::SocketAddr;

    use http::{HeaderName, HeaderValue};
    use opentelemetry::trace::{SpanId, TraceState};
    use proptest::prelude::*;
    use tokio::{
        net::{TcpSocket, TcpStream},
        time::{Instant, timeout},
    };
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

    use super::*;

    const TRACE_ID: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
    const SPAN_ID: u64 = 0x00f0_67aa_0ba9_02b7;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let value = HeaderValue::from_bytes(value.as_bytes()).expect("a header");
        HeaderMap::from_iter([(HeaderName::from_static(name), value)])
    }

    /// Returns the trace id, the span id, and whether the client samples the trace.
    fn parse(headers: &HeaderMap) -> Option<(u128, u64, bool)> {
        let parent = remote_parent(headers)?;
        let trace_id = u128::from_be_bytes(parent.trace_id().to_bytes());
        let span_id = u64::from_be_bytes(parent.span_id().to_bytes());
        Some((trace_id, span_id, parent.is_sampled()))
    }

    #[test]
    fn a_well_formed_traceparent_is_the_parent() {
        let ids = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        // Later versions may define flags and add fields.
        for (value, sampled) in [
            (format!("00-{ids}-01"), true),
            (format!("00-{ids}-00"), false),
            (format!("00-{ids}-03"), true),
            (format!("00-{ids}-fe"), false),
            (format!("01-{ids}-01"), true),
            (format!("cc-{ids}-01-what-the-future-is"), true),
        ] {
            let expected = Some((TRACE_ID, SPAN_ID, sampled));
            assert_eq!(parse(&headers(TRACEPARENT, &value)), expected, "{value}");
        }
        for value in [
            String::new(),
            ids.to_owned(),
            format!("ff-{ids}-01"),
            format!("0-{ids}-01"),
            format!("00-{ids}-1"),
            format!("00-{ids}-01-"),
            format!("00-{ids}-01-more"),
            format!("cc-{ids}-01.more"),
            format!("00-{ids}-0g"),
            format!("00-{ids}-+1"),
            format!("00-{}-01", ids.to_uppercase()),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{}-01", "0".repeat(16)),
            format!("00-{}-01", &ids[1..]),
            format!(" 00-{ids}-01"),
        ] {
            assert_eq!(parse(&headers(TRACEPARENT, &value)), None, "{value}");
        }
        let mut twice = headers(TRACEPARENT, &format!("00-{ids}-01"));
        twice.append(TRACEPARENT, twice[TRACEPARENT].clone());
        assert_eq!(parse(&twice), None);
        assert_eq!(parse(&HeaderMap::new()), None);
    }

    #[test]
    fn a_tracestate_is_propagated_up_to_its_maximum_length() {
        let state_of = |state: &str| {
            let mut headers =
                headers(TRACEPARENT, &format!("00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"));
            headers.extend(self::headers(TRACESTATE, state));
            remote_parent(&headers).expect("valid").trace_state().header()
        };
        assert_eq!(state_of("vendor=value"), "vendor=value");
        // A value has at most 256 characters.
        let longest = format!("a={},b={}", "x".repeat(252), "y".repeat(255));
        assert_eq!(longest.len(), MAX_TRACESTATE_BYTES);
        assert_eq!(state_of(&longest), longest);
        assert_eq!(state_of(&format!("{longest}x")), TraceState::NONE.header());
    }

    /// Returns for how many seconds a call waits for the collector at an address.
    async fn seconds_until_call_fails(address: SocketAddr) -> f64 {
        let uri = format!("http://{address}").parse().expect("a URI");
        let mut client = HealthClient::new(collector_endpoint(&uri).connect_lazy());
        let begun = Instant::now();
        let check = client.check(HealthCheckRequest::default());
        let response = timeout(Duration::from_hours(1), check).await;
        response.expect("it gives up").expect_err("the collector does not respond");
        begun.elapsed().as_secs_f64().round()
    }

    #[tokio::test(start_paused = true)]
    async fn an_export_waits_for_the_collector_for_ten_seconds() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = silent.local_addr().expect("a bound port");
        let seconds = seconds_until_call_fails(address).await;
        assert!((seconds - 10.0).abs() < 1.0, "{seconds}");
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

    proptest! {
        #[test]
        fn any_span_is_parsed_as_it_is_written(
            trace_id in 1_u128.., span_id in 1_u64.., flags: u8, version in 0_u8..0xff
        ) {
            let value = format!("{version:02x}-{trace_id:032x}-{span_id:016x}-{flags:02x}");
            let expected = Some((trace_id, span_id, flags % 2 == 1));
            prop_assert_eq!(parse(&headers(TRACEPARENT, &value)), expected);
        }

        #[test]
        fn any_traceparent_is_parsed_or_ignored(
            value in prop_oneof![
                "[ -~]{0,60}",
                "[0-9a-g]{2}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-fA-F]{1,3}(-[ -~]{0,5})?",
            ],
            state in "[ -~]{0,20}",
        ) {
            let mut read = headers(TRACEPARENT, &value);
            read.extend(headers(TRACESTATE, &state));
            if let Some((trace_id, span_id, sampled)) = parse(&read) {
                prop_assert!(trace_id != 0 && span_id != 0);
                prop_assert_ne!(SpanId::from(span_id), SpanId::INVALID);
                let version = &value[..2];
                let ids = format!("{version}-{trace_id:032x}-{span_id:016x}-");
                prop_assert!(value.starts_with(&ids), "{}", value);
                let flags = u8::from_str_radix(&value[ids.len()..ids.len() + 2], 16);
                prop_assert_eq!(flags.map(|flags| flags % 2 == 1), Ok(sampled));
            }
        }
    }
}
