//! The admin server: metrics, probes and the key set on a port of its own, over plain HTTP/1.1.
//! Every response comes from memory: no request waits for the database.

use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::Semaphore,
    time::timeout,
};

use super::{
    health::ReadinessReporter,
    metrics::{self, Metrics},
};

/// Open connections: a few scrapers and probes. Further ones wait to be accepted.
///
/// Test: `silent_admin_connections_time_out`.
const MAX_CONNECTIONS: usize = 16;

/// How long the headers of a request may take.
///
/// Test: `a_client_without_a_request_loses_its_connection`.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may take, its one response included: longer than the request may take,
/// so that a client that does not read loses its connection.
///
/// Test: `a_client_that_does_not_read_loses_its_connection`.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// The content type of a JWK set (RFC 7517, section 8.5.2).
const JWK_SET: &str = "application/jwk-set+json";

/// How long a verifier caches the key set: an hour. The next key is in it for a month before it
/// signs.
const KEY_SET_CACHE_CONTROL: &str = "max-age=3600";

/// The function that returns the JWK set in JSON, once it is known.
#[derive(Clone, Default)]
pub(crate) struct KeySetSource(Arc<OnceLock<Box<dyn Fn() -> String + Send + Sync>>>);

impl KeySetSource {
    /// Serves the key set from now on. Only the first call has an effect.
    pub(crate) fn set(&self, key_set: impl Fn() -> String + Send + Sync + 'static) {
        let _ = self.0.set(Box::new(key_set));
    }
}

impl fmt::Debug for KeySetSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("KeySetSource").finish_non_exhaustive()
    }
}

/// The admin server.
#[derive(Clone, Debug)]
pub(crate) struct AdminServer {
    /// The metrics of the process.
    pub(crate) metrics: Arc<Metrics>,
    /// The readiness of the services.
    pub(crate) readiness: ReadinessReporter,
    /// The public keys that verify access tokens.
    pub(crate) key_set: KeySetSource,
}

impl AdminServer {
    /// Serves until the future is dropped.
    pub(crate) async fn run(self, mut listener: TcpListener) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let routes = self.routes();
        while let Ok(slot) = slots.clone().acquire_owned().await {
            let (stream, _) = Listener::accept(&mut listener).await;
            let routes = routes.clone();
            tokio::spawn(async move {
                serve(stream, routes).await;
                drop(slot);
            });
        }
    }

    fn routes(self) -> Router {
        Router::new()
            .route(
                "/metrics",
                get(async |State(this): State<Self>, headers: HeaderMap| this.metrics(&headers)),
            )
            .route("/healthz", get(async || "ok\n"))
            .route("/readyz", get(async |State(this): State<Self>| this.readyz()))
            .route("/.well-known/jwks.json", get(async |State(this): State<Self>| this.key_set()))
            .fallback(async || {
                let paths =
                    "the paths are /metrics, /healthz, /readyz and /.well-known/jwks.json\n";
                (StatusCode::NOT_FOUND, paths)
            })
            .method_not_allowed_fallback(async || {
                let allow = [(header::ALLOW, "GET, HEAD")];
                (StatusCode::METHOD_NOT_ALLOWED, allow, "only GET and HEAD\n")
            })
            .with_state(self)
    }

    fn metrics(&self, headers: &HeaderMap) -> Response {
        match self.metrics.encode() {
            Ok(text) if accepts_openmetrics(headers) => {
                ([(header::CONTENT_TYPE, metrics::OPENMETRICS)], text).into_response()
            }
            Ok(text) => {
                let text = metrics::to_prometheus_text(&text);
                ([(header::CONTENT_TYPE, metrics::PROMETHEUS_TEXT)], text).into_response()
            }
            Err(error) => {
                tracing::error!(%error, "failed to encode metrics");
                (StatusCode::INTERNAL_SERVER_ERROR, "failed to encode metrics\n").into_response()
            }
        }
    }

    fn readyz(&self) -> (StatusCode, &'static str) {
        if self.readiness.is_ready() {
            (StatusCode::OK, "ok\n")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
        }
    }

    fn key_set(&self) -> Response {
        let Some(key_set) = self.key_set.0.get() else {
            return (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response();
        };
        let headers =
            [(header::CONTENT_TYPE, JWK_SET), (header::CACHE_CONTROL, KEY_SET_CACHE_CONTROL)];
        (headers, key_set()).into_response()
    }
}

/// Returns `true` if the client accepts OpenMetrics, and prefers no older format (RFC 9110, section
/// 12.5.1). One without `accept` accepts everything. One that accepts neither format gets the older
/// one.
fn accepts_openmetrics(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::ACCEPT);
    if values.iter().next().is_none() {
        return true;
    }
    let ranges: Vec<_> = values
        .iter()
        .flat_map(|value| value.to_str().unwrap_or_default().split(','))
        .map(parse_media_range)
        .collect();
    // The weight of the most specific range that covers the format.
    let weight = |covering: [&str; 3]| {
        let weight_of = |name: &&str| {
            let ranges = ranges.iter().filter(|(range, _)| range == *name);
            ranges.map(|(_, weight)| *weight).reduce(f32::max)
        };
        covering.iter().find_map(weight_of).unwrap_or(0.0)
    };
    let openmetrics = weight(["application/openmetrics-text", "application/*", "*/*"]);
    openmetrics > 0.0 && openmetrics >= weight(["text/plain", "text/*", "*/*"])
}

/// Returns a media range in lower case without its parameters, and its weight.
fn parse_media_range(text: &str) -> (String, f32) {
    let mut parts = text.split(';').map(|part| part.trim().to_ascii_lowercase());
    let range = parts.next().unwrap_or_default();
    let weight = parts.find_map(|parameter| parameter.strip_prefix("q=")?.parse().ok());
    (range, weight.unwrap_or(1.0))
}

/// Serves one request.
async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, routes: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    match timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "admin connection error"),
        Err(_) => tracing::debug!("admin connection timed out"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncWriteExt, time::Instant};

    use super::*;

    /// Returns for how many seconds the server serves a client that sends these bytes and reads
    /// nothing. The connection holds less than a response.
    async fn seconds_served(request: &[u8]) -> f64 {
        let (mut client, server) = tokio::io::duplex(64);
        let routes = Router::new().route("/", get(async || "a response".repeat(100)));
        let started = Instant::now();
        let serving = tokio::spawn(serve(server, routes));
        client.write_all(request).await.expect("sent");
        serving.await.expect("no panic");
        started.elapsed().as_secs_f64().round()
    }

    #[test]
    fn openmetrics_is_for_clients_that_accept_it() {
        let accepts = |value: &'static str| {
            let value = header::HeaderValue::from_static(value);
            accepts_openmetrics(&HeaderMap::from_iter([(header::ACCEPT, value)]))
        };
        assert!(accepts_openmetrics(&HeaderMap::new()));
        for yes in [
            "*/*",
            "application/*;q=0.5",
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            "text/html, Application/OpenMetrics-Text ; version=1.0.0",
            "application/openmetrics-text, text/plain",
            "text/plain;q=0.5, */*",
        ] {
            assert!(accepts(yes), "{yes}");
        }
        for no in [
            "text/plain",
            "text/plain;version=0.0.4",
            "application/json",
            "",
            "text/*, */*;q=0.0",
            // Prometheus, with the older format first in `scrape_protocols`.
            "text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,\
             */*;q=0.4",
            "application/openmetrics-text;q=0, */*",
        ] {
            assert!(!accepts(no), "{no}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_without_a_request_loses_its_connection() {
        let seconds = seconds_served(b"GET / HTTP/1.1\r\n").await;
        assert!((seconds - 5.0).abs() < 1.0, "{seconds}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_read_loses_its_connection() {
        let seconds = seconds_served(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!((seconds - 10.0).abs() < 1.0, "{seconds}");
    }
}
