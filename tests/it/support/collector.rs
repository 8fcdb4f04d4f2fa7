//! An OpenTelemetry collector for traces.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::Span,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

use super::wait::wait_until;

/// A collector that stores all spans. It stops when it is dropped.
pub struct Collector {
    address: SocketAddr,
    received: Received,
    shutdown: CancellationToken,
}

/// All spans, each with the attributes of its resource.
#[derive(Clone, Default)]
struct Received(Arc<Mutex<Vec<(Attributes, Span)>>>);

/// Attributes by name, as text.
pub type Attributes = HashMap<String, String>;

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource_spans in request.into_inner().resource_spans {
            let resource = resource_spans.resource.map(|resource| to_text(&resource.attributes));
            let resource = resource.unwrap_or_default();
            let spans = resource_spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let spans = spans.map(|span| (resource.clone(), span));
            self.0.lock().expect("not poisoned").extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn to_text(attributes: &[KeyValue]) -> Attributes {
    let value = |attribute: &KeyValue| {
        let value = attribute.value.as_ref().and_then(|value| value.value.as_ref());
        match value.expect("a value") {
            Value::StringValue(text) => text.clone(),
            Value::IntValue(number) => number.to_string(),
            other => panic!("{other:?}"),
        }
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), value(attribute))).collect()
}

/// Returns the attributes of a span.
pub fn attributes(span: &Span) -> Attributes {
    to_text(&span.attributes)
}

impl Collector {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::start_on(listener)
    }

    pub fn start_on(listener: TcpListener) -> Self {
        let address = listener.local_addr().expect("a bound port");
        let (received, shutdown) = (Received::default(), CancellationToken::new());
        let serving = Server::builder()
            .add_service(TraceServiceServer::new(received.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(shutdown.clone().run_until_cancelled_owned(serving));
        Self { address, received, shutdown }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns all spans so far, each with the attributes of its resource.
    pub fn received(&self) -> Vec<(Attributes, Span)> {
        self.received.0.lock().expect("not poisoned").clone()
    }

    /// Returns the spans of a trace so far.
    pub fn spans(&self, id: &str) -> Vec<Span> {
        let received = self.received().into_iter();
        received.map(|(_, span)| span).filter(|span| hex(&span.trace_id) == id).collect()
    }

    /// Waits for `count` spans of a trace.
    pub async fn wait_for_spans(&self, id: &str, count: usize) -> Vec<Span> {
        wait_until("the spans", async || self.spans(id).len() >= count).await;
        self.spans(id)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Formats an ID as in `traceparent`.
pub fn hex(id: &[u8]) -> String {
    use std::fmt::Write;
    id.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("infallible");
        text
    })
}
