//! A port of its own for metrics and probes, in plain HTTP/1.1. What it answers is known
//! already: it never waits for the database.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};

use crate::{
    connection::accept,
    health::Reporter,
    metrics::{self, Metrics},
};

/// Connections open at once: a few who scrape, a few probes. More wait to be accepted.
const MAX_CONNECTIONS: usize = 16;

/// How long a request may take to arrive.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may live, its one answer included: longer than the request may
/// take, so that a client that does not read loses its place.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Tells metrics and health.
#[derive(Clone, Debug)]
pub struct MetricsServer {
    /// What is told.
    pub metrics: Arc<Metrics>,
    /// Knows whether the service is ready.
    pub reporter: Reporter,
}

impl MetricsServer {
    /// Serves for ever.
    pub async fn run(self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        // Nobody closes it.
        while let Ok(place) = places.clone().acquire_owned().await {
            let (stream, _) = accept(&listener).await;
            let serving = self.clone().serve(stream);
            tokio::spawn(async move {
                serving.await;
                drop(place);
            });
        }
    }

    /// Answers one request.
    async fn serve(self, stream: TcpStream) {
        let service = service_fn(|request: Request<Incoming>| {
            let response = self.answer(request.method(), request.uri().path());
            async { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(READ_TIMEOUT)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service);
        match timeout(CONNECTION_TIMEOUT, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(cause = %error, "a connection for metrics broke"),
            Err(late) => tracing::debug!(cause = %late, "a connection for metrics was cut"),
        }
    }

    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        let answer = match path {
            "/metrics" | "/healthz" | "/readyz"
                if !matches!(*method, Method::GET | Method::HEAD) =>
            {
                let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
                let allowed = HeaderValue::from_static("GET, HEAD");
                refused.headers_mut().insert(header::ALLOW, allowed);
                return refused;
            }
            "/metrics" => return self.metrics(),
            "/healthz" => (StatusCode::OK, "ok\n"),
            "/readyz" if self.reporter.is_ready() => (StatusCode::OK, "ok\n"),
            "/readyz" => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
            _ => (StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n"),
        };
        text(answer.0, answer.1)
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        match self.metrics.encode() {
            Ok(metrics) => response(StatusCode::OK, metrics::CONTENT_TYPE, metrics.into()),
            Err(error) => {
                tracing::error!(cause = %error, "the metrics could not be written");
                text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written\n")
            }
        }
    }
}

fn text(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", Bytes::from_static(text.as_bytes()))
}

fn response(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
