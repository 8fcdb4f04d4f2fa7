//! Counts the SQL statements of each call: sqlx reports every one to the log, in the
//! span of the call, which holds the request id.

use std::{
    collections::HashMap,
    fmt,
    sync::{LazyLock, Mutex, Once},
};

use tracing::{
    Event, Id, Subscriber,
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
        if event.metadata().target() != "sqlx::query" {
            return;
        }
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(RequestId(request_id)) = span.extensions().get() {
                let mut counts = COUNTS.lock().expect("no test panicked here");
                *counts.entry(request_id.clone()).or_default() += 1;
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
