//! The port for metrics and probes, as those see it that ask it.

use std::net::SocketAddr;

use fast_zero::config::Config;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{
    App,
    app::config,
    wait::{eventually, in_time},
};

/// Settings for tests, with a port for metrics.
pub fn with_metrics() -> Config {
    Config { metrics_addr: Some(SocketAddr::from(([127, 0, 0, 1], 0))), ..config() }
}

/// An answer of the port.
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

/// Asks for one thing.
pub async fn ask(address: SocketAddr, method: &str, path: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    // The server closes the connection itself.
    in_time("an answer", stream.read_to_string(&mut answer)).await.expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Answer { status: status.expect("a status"), head: head.to_lowercase(), body: body.to_owned() }
}

impl App {
    pub async fn ask(&self, path: &str) -> Answer {
        ask(self.metrics_address.expect("it has metrics"), "GET", path).await
    }

    pub async fn scrape(&self) -> Scrape {
        Scrape::of(self.metrics_address.expect("it has metrics")).await
    }

    /// Waits until this many calls are under way.
    pub async fn until_under_way(&self, calls: u32) {
        eventually("so many calls are under way", async || {
            self.scrape().await.get("fastzero_calls_in_flight") == Some(f64::from(calls))
        })
        .await;
    }

    /// Waits until this many connections are open.
    pub async fn until_connected(&self, connections: u32) {
        eventually("so many connections are open", async || {
            self.scrape().await.get("fastzero_connections") == Some(f64::from(connections))
        })
        .await;
    }
}

/// All metrics at one moment.
pub struct Scrape(pub String);

impl Scrape {
    pub async fn of(address: SocketAddr) -> Self {
        let answer = ask(address, "GET", "/metrics").await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        Self(answer.body)
    }

    /// A series; `None` if there is none.
    pub fn get(&self, series: &str) -> Option<f64> {
        let values = self.0.lines().filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        values.map(|value| value.parse().expect("a number")).next()
    }

    pub fn calls(&self, method: &str, code: &str) -> f64 {
        let series = format!("fastzero_calls_total{{method=\"{method}\",code=\"{code}\"}}");
        self.get(&series).unwrap_or_default()
    }
}
