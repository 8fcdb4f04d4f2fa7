//! The metrics, in the text format of OpenMetrics.
//!
//! The metrics of calls are those of gRPC's own (gRFC A66): `grpc_server_call_…`. The others
//! have the prefix `fastzero_`. All label values come from lists that are known at startup, so
//! that no client can create series.

mod calls;
mod watches;

use std::{
    fmt,
    sync::{OnceLock, atomic::Ordering},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{family::Family, info::Info},
    registry::Registry,
};

pub(crate) use self::{
    calls::{CallMetrics, MethodMetrics, code_name},
    watches::WatchMetrics,
};
pub(crate) use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// The media type of [`Metrics::encode`].
pub(crate) const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The media type of [`to_prometheus_text`].
pub(crate) const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Converts OpenMetrics text to the older text format of Prometheus. There, the metadata of a
/// counter has the name of its samples, and neither units nor the end have a line.
pub(crate) fn to_prometheus_text(openmetrics: &str) -> String {
    let is_counter = |name: &str| {
        let declaration = format!("# TYPE {name} counter");
        openmetrics.lines().any(|line| line == declaration)
    };
    let mut text = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("EOF" | "UNIT"), ..) => continue,
            (Some("#"), Some(kind), Some(name), rest) if is_counter(name) => {
                let rest = rest.unwrap_or_default();
                text.extend(["# ", kind, " ", name, "_total ", rest]);
            }
            _ => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

/// The metrics of the process. A part that counts gets a clone of its metric.
#[derive(Debug)]
pub(crate) struct Metrics {
    pub(crate) calls: CallMetrics,
    pub(crate) calls_in_flight: Gauge,
    pub(crate) calls_shed: Counter,
    pub(crate) connections: Gauge,
    pub(crate) database_up: Gauge,
    pub(crate) password_failures: Counter,
    pub(crate) session_cache: SessionCacheMetrics,
    pub(crate) watches: WatchMetrics,
    pub(crate) todos_purged: Counter,
    pub(crate) tombstones_removed: Counter,
    connection_failures: Family<ReasonLabel, Counter>,
    log_lines_dropped: Counter,
    used_connections: Gauge,
    idle_connections: Gauge,
    hashing_jobs: Gauge,
    session_cache_users: Gauge,
    dropped_lines: fn() -> usize,
    sources: OnceLock<ScrapeSources>,
    registry: Registry,
}

/// Functions that return the current value of a gauge. Each scrape calls them.
pub(crate) struct ScrapeSources {
    /// Open database connections, and the idle ones among them.
    pub(crate) pool_status: Box<dyn Fn() -> (usize, usize) + Send + Sync>,
    /// Passwords that are hashed or queued.
    pub(crate) hashing_jobs: Box<dyn Fn() -> usize + Send + Sync>,
    /// Users with cached sessions.
    pub(crate) cached_users: Box<dyn Fn() -> usize + Send + Sync>,
}

impl fmt::Debug for ScrapeSources {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ScrapeSources").finish_non_exhaustive()
    }
}

/// The lookups in the session cache.
#[derive(Clone, Debug, Default)]
pub(crate) struct SessionCacheMetrics {
    pub(crate) hits: Counter,
    pub(crate) misses: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

impl Metrics {
    /// Creates the metrics of the methods at these paths. `dropped_lines` returns how many log
    /// lines were dropped.
    #[must_use]
    pub(crate) fn new<'a>(
        paths: impl Iterator<Item = &'a str>,
        dropped_lines: fn() -> usize,
    ) -> Self {
        let mut registry = Registry::default();
        let calls = CallMetrics::register(paths, &mut registry);
        let own = registry.sub_registry_with_prefix("fastzero");
        let build = [("version", env!("CARGO_PKG_VERSION")), ("commit", env!("FASTZERO_COMMIT"))];
        own.register("build", "Version and commit of the binary", Info::new(build.to_vec()));
        let states = Family::<StateLabel, Gauge>::default();
        let help = "Connections of the database pool by state";
        own.register("database_connections", help, states.clone());
        let state = |state| states.get_or_create_owned(&StateLabel { state });
        let results = Family::<ResultLabel, Counter>::default();
        let help = "Session cache lookups by result";
        own.register("session_cache_lookups", help, results.clone());
        let result = |result| results.get_or_create_owned(&ResultLabel { result });
        let connection_failures = Family::<ReasonLabel, Counter>::default();
        let help = "Connections that failed before their first call, by reason";
        own.register("connection_failures", help, connection_failures.clone());
        let watches = WatchMetrics::register(own);
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::default();
            own.register(name, help, gauge.clone());
            gauge
        };
        let calls_in_flight = gauge("calls_in_flight", "Calls in flight");
        let connections = gauge("connections", "Open client connections");
        let database_up = gauge(
            "database_up",
            "Whether the database is reachable and usable, and its schema is current",
        );
        let hashing_jobs =
            gauge("password_hashing_jobs", "Passwords that are being hashed or queued");
        let session_cache_users =
            gauge("session_cache_users", "Users with sessions or tokens in the credential cache");
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            own.register(name, help, counter.clone());
            counter
        };
        Self {
            calls,
            calls_in_flight,
            calls_shed: counter("calls_shed", "Calls shed because the server was overloaded"),
            connections,
            database_up,
            password_failures: counter("password_failures", "Password checks that failed"),
            session_cache: SessionCacheMetrics { hits: result("hit"), misses: result("miss") },
            watches,
            todos_purged: counter("todos_purged", "Deleted todos that the sweep purged"),
            tombstones_removed: counter("tombstones_removed", "Tombstones that the sweep removed"),
            connection_failures,
            log_lines_dropped: counter(
                "log_lines_dropped",
                "Log lines dropped because the buffer was full",
            ),
            used_connections: state("used"),
            idle_connections: state("idle"),
            hashing_jobs,
            session_cache_users,
            dropped_lines,
            sources: OnceLock::new(),
            registry,
        }
    }

    /// Sets the sources of the gauges that are read at each scrape. Only the first call has an
    /// effect.
    pub(crate) fn set_sources(&self, sources: ScrapeSources) {
        let _ = self.sources.set(sources);
    }

    /// Returns the counter of failed connections with this reason.
    #[must_use]
    pub(crate) fn connection_failures(&self, reason: &'static str) -> Counter {
        self.connection_failures.get_or_create_owned(&ReasonLabel { reason })
    }

    /// Returns all metrics as text. Does not wait.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        if let Some(sources) = self.sources.get() {
            let (open, idle) = (sources.pool_status)();
            set(&self.used_connections, open.saturating_sub(idle));
            set(&self.idle_connections, idle);
            set(&self.hashing_jobs, (sources.hashing_jobs)());
            set(&self.session_cache_users, (sources.cached_users)());
        }
        let dropped = (self.dropped_lines)() as u64;
        self.log_lines_dropped.inner().store(dropped, Ordering::Relaxed);
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn set(gauge: &Gauge, count: usize) {
    gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
}

/// An increment of a gauge, taken back on drop.
#[derive(Debug)]
pub(crate) struct GaugeGuard(Gauge);

impl GaugeGuard {
    /// Increments the gauge.
    #[must_use]
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::Code;

    use super::*;

    #[test]
    fn unknown_methods_share_one_series() {
        let metrics = Metrics::new(["/a.B/C"].into_iter(), || 0);
        for path in ["/a.B/C", "/a.B/C/", "/a.B/c", "", "/evil\"\n"] {
            let method = metrics.calls.get(path);
            method.start();
            method.observe(Code::Ok, Duration::from_millis(3));
        }
        let text = metrics.encode().expect("encoded");
        let duration = "grpc_server_call_duration_seconds";
        for line in [
            r#"grpc_server_call_started_total{grpc_method="a.B/C"} 1"#.to_owned(),
            r#"grpc_server_call_started_total{grpc_method="other"} 4"#.to_owned(),
            format!(r#"{duration}_count{{grpc_method="a.B/C",grpc_status="OK"}} 1"#),
            format!(r#"{duration}_count{{grpc_method="other",grpc_status="OK"}} 4"#),
            format!(r#"{duration}_bucket{{le="0.0025",grpc_method="a.B/C",grpc_status="OK"}} 0"#),
            format!(r#"{duration}_bucket{{le="0.005",grpc_method="a.B/C",grpc_status="OK"}} 1"#),
            "# EOF".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }
}
