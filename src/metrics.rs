//! What the service counts and measures, in the text format that Prometheus reads.
//!
//! A label takes its values from a list that is known at the start, so that no caller can
//! make a series of their own.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{family::Family, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};
use tonic::Code;

pub use prometheus_client::metrics::{counter::Counter, gauge::Gauge};

/// The media type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The upper bounds of durations, in seconds: from a look-up by key to the longest deadline.
const BUCKETS: [f64; 13] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// What the protocol calls [`Code`]s, by their number.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// What the protocol calls a code, and so do the metrics and the log.
#[must_use]
pub fn code_name(code: Code) -> &'static str {
    CODES[code as usize]
}

/// What all methods that do not exist are called together.
const UNKNOWN_METHOD: &str = "unknown";

/// All metrics. Who counts something gets a clone of that one.
#[derive(Debug)]
pub struct Metrics {
    /// Calls, by their method.
    pub calls: Calls,
    /// Calls under way.
    pub calls_in_flight: Gauge,
    /// Calls that were turned away because there was too much to do.
    pub calls_shed: Counter,
    /// Open connections of callers.
    pub connections: Gauge,
    /// 1 while the database answers and has the schema that is needed, else 0.
    pub database_up: Gauge,
    /// Wrong passwords.
    pub logins_failed: Counter,
    /// Checks whether a caller's session is alive.
    pub session_checks: SessionChecks,
    log_lines_lost: Counter,
    open_connections: Gauge,
    idle_connections: Gauge,
    hashing_queue: Gauge,
    session_cache_users: Gauge,
    sources: OnceLock<ScrapeSources>,
    lost_lines: fn() -> usize,
    registry: Registry,
}

/// Functions that return the current value of a gauge, called at each scrape.
pub struct ScrapeSources {
    /// Open connections to the database, and idle ones among them.
    pub connections: Box<dyn Fn() -> (usize, usize) + Send + Sync>,
    /// Passwords that are hashed or wait for it.
    pub hashing_jobs: Box<dyn Fn() -> usize + Send + Sync>,
    /// Users with cached sessions.
    pub cached_users: Box<dyn Fn() -> usize + Send + Sync>,
}

impl fmt::Debug for ScrapeSources {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ScrapeSources").finish_non_exhaustive()
    }
}

/// How it was found out whether a caller's session is alive.
#[derive(Clone, Debug, Default)]
pub struct SessionChecks {
    /// From what is remembered.
    pub hits: Counter,
    /// By asking the database.
    pub misses: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    method: String,
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabel {
    method: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

impl Metrics {
    /// Creates the metrics of the methods at these paths. `lost_lines` returns how many lines
    /// of the log were dropped.
    #[must_use]
    pub fn new<'a>(paths: impl Iterator<Item = &'a str>, lost_lines: fn() -> usize) -> Self {
        let mut registry = Registry::with_prefix("fastzero");
        let calls = Calls::register(paths, &mut registry);
        let build = [("version", env!("CARGO_PKG_VERSION")), ("commit", env!("FASTZERO_COMMIT"))];
        registry.register("build", "What runs", Info::new(build.to_vec()));
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let calls_in_flight = gauge("calls_in_flight", "Calls under way");
        let connections = gauge("connections", "Open connections of callers");
        let database_up =
            gauge("database_up", "Whether the database answers and has the schema that is needed");
        let hashing_queue = gauge("hashing_queue", "Passwords that are hashed or wait for it");
        let session_cache_users =
            gauge("session_cache_users", "Users whose sessions are remembered");
        let mut counter = |name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let calls_shed =
            counter("calls_shed", "Calls turned away because there was too much to do");
        let logins_failed = counter("logins_failed", "Wrong passwords");
        let log_lines_lost =
            counter("log_lines_lost", "Lines of the log that were lost: who reads it is too slow");
        let states = Family::<StateLabel, Gauge>::default();
        registry.register(
            "database_connections",
            "Connections of calls to the database",
            states.clone(),
        );
        let state = |state| states.get_or_create_owned(&StateLabel { state });
        let results = Family::<ResultLabel, Counter>::default();
        registry.register(
            "session_checks",
            "Checks of sessions: by what is remembered, or not",
            results.clone(),
        );
        let result = |result| results.get_or_create_owned(&ResultLabel { result });
        Self {
            calls,
            calls_in_flight,
            calls_shed,
            connections,
            database_up,
            log_lines_lost,
            logins_failed,
            session_checks: SessionChecks { hits: result("hit"), misses: result("miss") },
            open_connections: state("open"),
            idle_connections: state("idle"),
            hashing_queue,
            session_cache_users,
            sources: OnceLock::new(),
            lost_lines,
            registry,
        }
    }

    /// Reads the gauges of the database, the hashing pool and the session cache from these
    /// sources. Only the first call has an effect.
    pub fn set_sources(&self, sources: ScrapeSources) {
        let _ = self.sources.set(sources);
    }

    /// All metrics, as of now. Waits for nothing.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        if let Some(sources) = self.sources.get() {
            let (open, idle) = (sources.connections)();
            set(&self.open_connections, open);
            set(&self.idle_connections, idle);
            set(&self.hashing_queue, (sources.hashing_jobs)());
            set(&self.session_cache_users, (sources.cached_users)());
        }
        self.log_lines_lost.inner().store((self.lost_lines)() as u64, Ordering::Relaxed);
        let mut text = String::new();
        text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

fn set(gauge: &Gauge, count: usize) {
    gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
}

/// The metrics of all methods.
#[derive(Debug)]
pub struct Calls {
    /// By path.
    methods: HashMap<String, Arc<Method>>,
    unknown: Arc<Method>,
}

impl Calls {
    fn register<'a>(paths: impl Iterator<Item = &'a str>, registry: &mut Registry) -> Self {
        let calls = Family::default();
        registry.register("calls", "Calls that ended, by their code", calls.clone());
        let durations = Family::new_with_constructor((|| Histogram::new(BUCKETS)) as fn() -> _);
        let help = "How long calls took until their answer was there";
        registry.register_with_unit("call_duration", help, Unit::Seconds, durations.clone());
        let method = |name: &str| Arc::new(Method::new(name, calls.clone(), &durations));
        let named = |path: &str| (path.to_owned(), method(path.strip_prefix('/').unwrap_or(path)));
        Self { methods: paths.map(named).collect(), unknown: method(UNKNOWN_METHOD) }
    }

    /// The metrics of the method at a path.
    #[must_use]
    pub fn of(&self, path: &str) -> &Arc<Method> {
        self.methods.get(path).unwrap_or(&self.unknown)
    }
}

/// The metrics of one method. They are found once, so that a call only adds to them.
#[derive(Debug)]
pub struct Method {
    name: String,
    calls: Family<CallLabels, Counter>,
    /// By the number of the code; but for OK, there from the first call that ended with it.
    by_code: [OnceLock<Counter>; CODES.len()],
    duration: Histogram,
}

impl Method {
    fn new(
        name: &str,
        calls: Family<CallLabels, Counter>,
        durations: &Family<MethodLabel, Histogram>,
    ) -> Self {
        let duration = durations.get_or_create_owned(&MethodLabel { method: name.to_owned() });
        let by_code = [const { OnceLock::new() }; CODES.len()];
        let method = Self { name: name.to_owned(), calls, by_code, duration };
        method.ended_with(Code::Ok);
        method
    }

    /// What it is called in metrics: `unknown` if there is no such method.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Counts a call that has ended.
    pub fn count(&self, code: Code, duration: Duration) {
        self.ended_with(code).inc();
        self.duration.observe(duration.as_secs_f64());
    }

    fn ended_with(&self, code: Code) -> &Counter {
        let number = code as usize;
        self.by_code[number].get_or_init(|| {
            let labels = CallLabels { method: self.name.clone(), code: code_name(code) };
            self.calls.get_or_create_owned(&labels)
        })
    }
}

/// One of those that a gauge counts, as long as it lives.
#[derive(Debug)]
pub struct Counted(Gauge);

impl Counted {
    /// One more.
    #[must_use]
    pub fn by(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_names_of_the_protocol() {
        for (number, name) in (0..).zip(CODES) {
            let code = Code::from_i32(number);
            assert_eq!(code as i32, number);
            assert_eq!(format!("{code:?}").to_uppercase(), name.replace('_', ""));
            assert_eq!(code_name(code), name);
        }
    }

    #[test]
    fn what_is_not_known_is_one_series() {
        let metrics = Metrics::new(["/a.B/C"].into_iter(), || 0);
        for path in ["/a.B/C", "/a.B/C/", "/a.B/c", "", "/evil\"\n"] {
            metrics.calls.of(path).count(Code::Ok, Duration::from_millis(3));
        }
        let text = metrics.encode().expect("encoded");
        for line in [
            r#"fastzero_calls_total{method="a.B/C",code="OK"} 1"#,
            r#"fastzero_calls_total{method="unknown",code="OK"} 4"#,
            r#"fastzero_call_duration_seconds_bucket{le="0.0025",method="a.B/C"} 0"#,
            r#"fastzero_call_duration_seconds_bucket{le="0.005",method="a.B/C"} 1"#,
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
    }
}
