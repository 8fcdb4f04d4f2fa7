//! The metrics of calls, by method and status code.

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};
use tonic::Code;

/// The upper bounds of durations, in seconds: from a lookup by key to the call timeout.
const BUCKETS: [f64; 13] =
    [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0];

/// The names of status codes in the protocol, by number.
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

/// Returns the name of a status code in the protocol.
#[must_use]
pub(crate) fn code_name(code: Code) -> &'static str {
    CODES[code as usize]
}

/// The method label of all unknown methods (A66).
const OTHER_METHOD: &str = "other";

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    grpc_method: String,
    grpc_status: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabel {
    grpc_method: String,
}

/// The metrics of calls, by method.
#[derive(Debug)]
pub(crate) struct CallMetrics {
    /// By path.
    methods: HashMap<String, Arc<MethodMetrics>>,
    other: Arc<MethodMetrics>,
}

impl CallMetrics {
    pub(super) fn register<'a>(
        paths: impl Iterator<Item = &'a str>,
        registry: &mut Registry,
    ) -> Self {
        let started = Family::<MethodLabel, Counter>::default();
        registry.register("grpc_server_call_started", "Calls that started", started.clone());
        let durations = Durations::new_with_constructor((|| Histogram::new(BUCKETS)) as fn() -> _);
        let help = "Duration of calls until the end of the response, streams included";
        registry.register_with_unit(
            "grpc_server_call_duration",
            help,
            Unit::Seconds,
            durations.clone(),
        );
        let method = |name: &str| {
            let label = MethodLabel { grpc_method: name.to_owned() };
            let started = started.get_or_create_owned(&label);
            Arc::new(MethodMetrics::new(name, started, durations.clone()))
        };
        let named = |path: &str| (path.to_owned(), method(path.strip_prefix('/').unwrap_or(path)));
        Self { methods: paths.map(named).collect(), other: method(OTHER_METHOD) }
    }

    /// Returns the metrics of the method at a path.
    #[must_use]
    pub(crate) fn get(&self, path: &str) -> &Arc<MethodMetrics> {
        self.methods.get(path).unwrap_or(&self.other)
    }
}

type Durations = Family<CallLabels, Histogram, fn() -> Histogram>;

/// The metrics of one method. Each series is looked up once, so that a call only adds to it.
#[derive(Debug)]
pub(crate) struct MethodMetrics {
    name: String,
    started: Counter,
    durations: Durations,
    /// By the number of the status code. The series of OK exists from the start, each other one
    /// from the first call with it.
    by_code: [OnceLock<Histogram>; CODES.len()],
}

impl MethodMetrics {
    fn new(name: &str, started: Counter, durations: Durations) -> Self {
        let by_code = [const { OnceLock::new() }; CODES.len()];
        let metrics = Self { name: name.to_owned(), started, durations, by_code };
        metrics.duration_for(Code::Ok);
        metrics
    }

    /// Returns the value of the method label.
    #[must_use]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Counts a call that started.
    pub(crate) fn start(&self) {
        self.started.inc();
    }

    /// Counts a call that ended.
    pub(crate) fn observe(&self, code: Code, duration: Duration) {
        self.duration_for(code).observe(duration.as_secs_f64());
    }

    fn duration_for(&self, code: Code) -> &Histogram {
        self.by_code[code as usize].get_or_init(|| {
            let grpc_method = self.name.clone();
            let labels = CallLabels { grpc_method, grpc_status: code_name(code) };
            self.durations.get_or_create_owned(&labels)
        })
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
}
