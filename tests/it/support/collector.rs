//! A collector of traces, as OpenTelemetry's.

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

use super::wait::eventually;

/// Keeps what it is sent. It stops when this is dropped.
pub struct Collector {
    address: SocketAddr,
    received: Received,
    closing: CancellationToken,
}

/// Each span, with the attributes of what it comes from.
#[derive(Clone, Default)]
struct Received(Arc<Mutex<Vec<(Attributes, Span)>>>);

/// By name, as text.
pub type Attributes = HashMap<String, String>;

#[tonic::async_trait]
impl TraceService for Received {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_spans {
            let resource = of_resource.resource.map(|resource| texts(&resource.attributes));
            let resource = resource.unwrap_or_default();
            let spans = of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans);
            let spans = spans.map(|span| (resource.clone(), span));
            self.0.lock().expect("no test panicked here").extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn texts(attributes: &[KeyValue]) -> Attributes {
    let text = |attribute: &KeyValue| {
        let value = attribute.value.as_ref().and_then(|value| value.value.as_ref());
        match value.expect("a value") {
            Value::StringValue(text) => text.clone(),
            Value::IntValue(number) => number.to_string(),
            other => panic!("{other:?}"),
        }
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}

/// The attributes of a span.
pub fn attributes(span: &Span) -> Attributes {
    texts(&span.attributes)
}

impl Collector {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::start_on(listener)
    }

    pub fn start_on(listener: TcpListener) -> Self {
        let address = listener.local_addr().expect("it is bound");
        let (received, closing) = (Received::default(), CancellationToken::new());
        let serving = Server::builder()
            .add_service(TraceServiceServer::new(received.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(closing.clone().run_until_cancelled_owned(serving));
        Self { address, received, closing }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All spans so far, with the attributes of what they come from.
    pub fn received(&self) -> Vec<(Attributes, Span)> {
        self.received.0.lock().expect("no test panicked here").clone()
    }

    /// The spans of a trace so far.
    pub fn trace(&self, id: &str) -> Vec<Span> {
        let received = self.received().into_iter();
        received.map(|(_, span)| span).filter(|span| hex(&span.trace_id) == id).collect()
    }

    /// Waits for as many spans of a trace.
    pub async fn until_trace(&self, id: &str, count: usize) -> Vec<Span> {
        eventually("the spans", async || self.trace(id).len() >= count).await;
        self.trace(id)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

/// As in `traceparent`.
pub fn hex(id: &[u8]) -> String {
    use std::fmt::Write;
    id.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("text takes everything");
        text
    })
}
