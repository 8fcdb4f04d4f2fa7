//! Counts the SQL statements of each call: sqlx logs each of them in the span of the call,
//! which contains the request ID. Also records the warnings and errors of each call.

use std::{
    collections::HashMap,
    fmt::{self, Write},
    sync::{LazyLock, Mutex, Once},
};

use tracing::{
    Event, Id, Level, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span::Attributes,
};
use tracing_subscriber::{
    Layer,
    filter::Targets,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

static COUNTS: LazyLock<Mutex<HashMap<String, usize>>> = LazyLock::new(Mutex::default);

/// Request IDs, each with the fields of a warning or an error.
static WARNINGS: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Starts counting, for the rest of the run.
pub fn install() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let targets = Targets::new()
            .with_target("sqlx::query", LevelFilter::DEBUG)
            .with_target("fast_zero", LevelFilter::INFO);
        tracing_subscriber::registry().with(CallLayer.with_filter(targets)).init();
    });
}

/// Returns how many statements the call with this request ID has sent.
pub fn statement_count(request_id: &str) -> usize {
    COUNTS.lock().expect("not poisoned").get(request_id).copied().unwrap_or_default()
}

/// Returns the warnings and errors of the calls whose request ID starts with this prefix.
pub fn logged_warnings(prefix: &str) -> Vec<String> {
    let warnings = WARNINGS.lock().expect("not poisoned");
    let matching = warnings.iter().filter(|(request_id, _)| request_id.starts_with(prefix));
    matching.map(|(request_id, fields)| format!("{request_id}: {fields}")).collect()
}

struct CallLayer;

struct RequestId(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for CallLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut visitor = RequestIdVisitor(None);
        attributes.record(&mut visitor);
        if let (Some(request_id), Some(span)) = (visitor.0, context.span(id)) {
            span.extensions_mut().insert(RequestId(request_id));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let is_statement = event.metadata().target() == "sqlx::query";
        if !is_statement && *event.metadata().level() > Level::WARN {
            return;
        }
        for span in context.event_scope(event).into_iter().flatten() {
            let extensions = span.extensions();
            let Some(RequestId(request_id)) = extensions.get() else {
                continue;
            };
            if is_statement {
                let mut counts = COUNTS.lock().expect("not poisoned");
                *counts.entry(request_id.clone()).or_default() += 1;
            } else {
                let mut visitor = FieldVisitor::default();
                event.record(&mut visitor);
                let mut warnings = WARNINGS.lock().expect("not poisoned");
                warnings.push((request_id.clone(), visitor.0));
            }
        }
    }
}

struct RequestIdVisitor(Option<String>);

impl Visit for RequestIdVisitor {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "request_id" {
            self.0 = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

/// The text of all fields of an event.
#[derive(Default)]
struct FieldVisitor(String);

impl Visit for FieldVisitor {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = write!(self.0, "{field}={value:?} ");
    }
}
