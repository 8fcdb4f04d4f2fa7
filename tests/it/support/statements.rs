//! Counts the SQL statements of each call: sqlx reports every one to the log, in the
//! span of the call, which holds the request id. What the service complains of in the
//! log is kept in the same way.

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

/// Request ids, and what was logged with them as a warning or an error.
static COMPLAINTS: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Starts counting, for the rest of the run.
pub fn count_from_now_on() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let targets = Targets::new()
            .with_target("sqlx::query", LevelFilter::DEBUG)
            .with_target("fast_zero", LevelFilter::INFO);
        tracing_subscriber::registry().with(Counter.with_filter(targets)).init();
    });
}

/// How many statements the call with this request id has sent.
pub fn count_of(request_id: &str) -> usize {
    COUNTS.lock().expect("no test panicked here").get(request_id).copied().unwrap_or_default()
}

/// The warnings and errors that were logged in calls whose request id begins with this.
pub fn complaints_of(prefix: &str) -> Vec<String> {
    let complaints = COMPLAINTS.lock().expect("no test panicked here");
    let of_them = complaints.iter().filter(|(request_id, _)| request_id.starts_with(prefix));
    of_them.map(|(request_id, text)| format!("{request_id}: {text}")).collect()
}

struct Counter;

struct RequestId(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Counter {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut found = Found(None);
        attributes.record(&mut found);
        if let (Some(request_id), Some(span)) = (found.0, context.span(id)) {
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
                let mut counts = COUNTS.lock().expect("no test panicked here");
                *counts.entry(request_id.clone()).or_default() += 1;
            } else {
                let mut text = Text::default();
                event.record(&mut text);
                let mut complaints = COMPLAINTS.lock().expect("no test panicked here");
                complaints.push((request_id.clone(), text.0));
            }
        }
    }
}

struct Found(Option<String>);

impl Visit for Found {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "request_id" {
            self.0 = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

/// All fields of an event.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = write!(self.0, "{field}={value:?} ");
    }
}
