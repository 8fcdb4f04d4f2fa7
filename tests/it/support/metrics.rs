//! Clients of the port for metrics and probes.

use std::net::SocketAddr;

use fast_zero::Config;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    App,
    app::config_with,
    wait::{wait_until, with_timeout},
};

/// Returns the settings for tests, with a port for metrics.
pub fn config_with_metrics() -> Config {
    config_with(|config| {
        config.listen.metrics_addr = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    })
}

/// A response of the port.
pub struct HttpResponse {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// Sends one request.
pub async fn http_request(address: SocketAddr, method: &str, path: &str) -> HttpResponse {
    http_request_with(address, method, path, "").await
}

/// Sends one request with more header lines.
pub async fn http_request_with(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
) -> HttpResponse {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut response = String::new();
    // The server closes the connection.
    with_timeout("a response", stream.read_to_string(&mut response)).await.expect("text");
    let (head, body) = response.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    HttpResponse {
        status: status.expect("a status"),
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

impl App {
    pub async fn http_get(&self, path: &str) -> HttpResponse {
        http_request(self.metrics_address.expect("a port for metrics"), "GET", path).await
    }

    pub async fn scrape(&self) -> Scrape {
        Scrape::fetch(self.metrics_address.expect("a port for metrics")).await
    }

    /// Waits until this many calls are in flight.
    pub async fn wait_until_in_flight(&self, calls: u32) {
        wait_until("the expected number of calls are in flight", async || {
            self.scrape().await.get("fastzero_calls_in_flight") == Some(f64::from(calls))
        })
        .await;
    }

    /// Waits until this many connections are open.
    pub async fn wait_until_connections(&self, connections: u32) {
        wait_until("the expected number of connections are open", async || {
            self.scrape().await.get("fastzero_connections") == Some(f64::from(connections))
        })
        .await;
    }
}

/// The text of all metrics.
pub struct Scrape(pub String);

impl Scrape {
    pub async fn fetch(address: SocketAddr) -> Self {
        let response = http_request(address, "GET", "/metrics").await;
        assert_eq!(response.status, 200, "{}", response.body);
        Self(response.body)
    }

    /// Returns the value of a series. Returns `None` if the series does not exist.
    pub fn get(&self, series: &str) -> Option<f64> {
        let values = self.0.lines().filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        values.map(|value| value.parse().expect("a number")).next()
    }

    /// Returns how many calls of a method ended with a code.
    pub fn call_count(&self, method: &str, code: &str) -> f64 {
        let series = format!(
            "grpc_server_call_duration_seconds_count{{grpc_method=\"{method}\",grpc_status=\"{code}\"}}"
        );
        self.get(&series).unwrap_or_default()
    }
}
