//! A gRPC server in a process of its own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
    time::{sleep, timeout},
};

use crate::error::Result;

const START_TIMEOUT: Duration = Duration::from_mins(1);
/// Longer than the grace period of the service.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);
/// The pause between two reads of a starting server's log: the resolution of the measured
/// startup time.
const LOG_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// How much of the end of a log an error shows.
const LOG_TAIL_BYTES: usize = 2_000;

#[derive(Debug)]
pub struct Server {
    child: Child,
    pub pid: i32,
    /// Host and port.
    pub address: String,
    /// The time from the spawn to the log line that reports the address.
    pub startup: Duration,
    log: PathBuf,
}

impl Server {
    /// Starts a server and waits until it logs, as fast-zero does, that it is serving.
    ///
    /// The log goes to a file that is not read during a measurement, because a reader would
    /// take CPU time from the server.
    pub async fn start(mut command: Command, log: &Path) -> Result<Self> {
        let started_at = Instant::now();
        command.stdout(Stdio::null()).stderr(fs::File::create(log)?);
        let mut child = command.spawn()?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).ok_or("no process ID")?;
        let address = timeout(START_TIMEOUT, wait_for_address(&mut child, log)).await??;
        let startup = started_at.elapsed();
        Ok(Self { child, pid, address, startup, log: log.to_owned() })
    }

    /// Sends SIGTERM and returns the time until the process ended.
    pub async fn stop(mut self) -> Result<Duration> {
        let started_at = Instant::now();
        signal::kill(Pid::from_raw(self.pid), Signal::SIGTERM)?;
        timeout(STOP_TIMEOUT, self.child.wait()).await??;
        Ok(started_at.elapsed())
    }

    /// Returns the value of a metric without labels. The server must have `METRICS_ADDR`.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let log = fs::read_to_string(&self.log)?;
        let address = log.lines().find_map(|line| parse_address(line, "serving metrics"));
        let mut stream = TcpStream::connect(address.ok_or("the server has no metrics")?).await?;
        // With HTTP/1.0, the response ends with the connection.
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await?;
        let mut response = String::new();
        stream.read_to_string(&mut response).await?;
        let value = parse_metric(&response, name);
        value.ok_or_else(|| format!("the server has no metric {name}").into())
    }

    pub fn log_tail(&self) -> String {
        log_tail(&self.log)
    }
}

async fn wait_for_address(child: &mut Child, log: &Path) -> Result<String> {
    loop {
        let text = fs::read_to_string(log)?;
        if let Some(address) = text.lines().find_map(|line| parse_address(line, "serving")) {
            return Ok(address);
        }
        if let Some(status) = child.try_wait()? {
            return Err(format!("server exited with {status}:\n{}", log_tail(log)).into());
        }
        sleep(LOG_POLL_INTERVAL).await;
    }
}

/// Returns the address if this is the JSON line of the log with this message.
fn parse_address(line: &str, message: &str) -> Option<String> {
    let is_message = line.contains(&format!("\"{message}\""));
    let (_, rest) = is_message.then(|| line.split_once("\"address\":\""))??;
    rest.split_once('"').map(|(address, _)| address.to_owned())
}

/// Returns the value of a metric in the text format of Prometheus.
fn parse_metric(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn log_tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_TAIL_BYTES)..]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_is_in_the_serving_line_only() {
        let serving = r#"{"level":"INFO","message":"serving","address":"127.0.0.1:50051"}"#;
        let address = |line| parse_address(line, "serving");
        assert_eq!(address(serving).as_deref(), Some("127.0.0.1:50051"));
        let metrics = r#"{"level":"INFO","message":"serving metrics","address":"127.0.0.1:9090"}"#;
        assert_eq!(address(metrics), None);
        assert_eq!(address(r#"{"message":"serving""#), None);
        assert_eq!(parse_address(metrics, "serving metrics").as_deref(), Some("127.0.0.1:9090"));
    }

    #[test]
    fn a_metric_is_found_by_its_whole_name() {
        let text = "# TYPE polls_count counter\r\npolls_count_total 9\npolls_count 5\n";
        assert_eq!(parse_metric(text, "polls_count"), Some(5.0));
        assert_eq!(parse_metric(text, "polls"), None);
    }
}
