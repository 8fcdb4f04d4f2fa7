//! Logging to standard error. [`crate::call`] writes the one line of each call.

use std::{
    fmt::{self, Write},
    fs::File,
    io::{self, BufWriter, IsTerminal},
    os::fd::AsFd,
    sync::OnceLock,
    thread,
    time::Duration,
};

use clap::ValueEnum;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    field::RecordFields,
    filter::Targets,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields, Layer,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    layer::SubscriberExt,
    registry::{LookupSpan, Registry},
    util::SubscriberInitExt,
};

/// The maximum number of buffered lines, about 2 MiB at level INFO. If the reader of the log
/// stalls and the pipe is full, calls continue and further lines are dropped.
///
/// Test: `calls_do_not_wait_for_a_log_that_nobody_reads`.
const MAX_BUFFERED_LINES: usize = 4_096;

/// How long lines are collected before one write. A line that finds the log thread asleep has
/// to wake it, which takes longer than to format the line.
const BATCH_WINDOW: Duration = Duration::from_millis(5);

/// The format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Human-readable text.
    Pretty,
    /// One JSON object per line.
    Json,
}

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Initializes logging to standard error. Call it once; later calls have no effect. Dropping
/// the guard writes the buffered lines.
#[must_use = "the log ends when it is dropped"]
pub fn init(targets: Targets, format: Option<LogFormat>) -> WorkerGuard {
    let is_terminal = io::stderr().is_terminal();
    let pretty = match format {
        Some(format) => format == LogFormat::Pretty,
        None => is_terminal,
    };
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(MAX_BUFFERED_LINES)
        .thread_name("log")
        .finish(BatchingWriter(BufWriter::new(dup_stderr())));
    let _ = DROPPED.set(writer.error_counter());
    let lines = Layer::new().with_writer(writer);
    let _ = if pretty {
        Registry::default().with(lines.with_ansi(is_terminal)).with(targets).try_init()
    } else {
        let lines = lines.fmt_fields(JsonFormat).event_format(JsonFormat);
        Registry::default().with(lines).with(targets).try_init()
    };
    guard
}

/// A writer that pauses for [`BATCH_WINDOW`] after each flush, so that lines are written in
/// batches.
struct BatchingWriter<W: io::Write>(BufWriter<W>);

impl<W: io::Write> io::Write for BatchingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        thread::sleep(BATCH_WINDOW);
        Ok(())
    }
}

/// Duplicates standard error. If its reader stalls, a blocked write of the log does not hold
/// the lock that a panic message needs.
fn dup_stderr() -> Box<dyn io::Write + Send> {
    match io::stderr().as_fd().try_clone_to_owned() {
        Ok(fd) => Box::new(File::from(fd)),
        Err(_) => Box::new(io::stderr()),
    }
}

/// Returns the number of lines dropped because the buffer was full.
#[must_use]
pub fn dropped_lines() -> usize {
    DROPPED.get().map_or(0, ErrorCounter::dropped_lines)
}

/// The JSON format: one object per event and line, with the fields of the event's span in
/// `span`. It formats the fields of a span once for all lines, whereas the JSON format of
/// `tracing-subscriber` parses them into a tree for each line.
struct JsonFormat;

impl<'writer> FormatFields<'writer> for JsonFormat {
    fn format_fields<F: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: F,
    ) -> fmt::Result {
        let mut visitor = JsonVisitor { writer: &mut writer, result: Ok(()) };
        fields.record(&mut visitor);
        visitor.result
    }
}

impl<S: Subscriber + for<'span> LookupSpan<'span>> FormatEvent<S, Self> for JsonFormat {
    fn format_event(
        &self,
        context: &FmtContext<'_, S, Self>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        writer.write_str("{\"timestamp\":\"")?;
        SystemTime.format_time(&mut writer)?;
        write!(writer, "\",\"level\":\"{}\"", metadata.level())?;
        self.format_fields(writer.by_ref(), event)?;
        write!(writer, ",\"target\":\"{}\"", metadata.target())?;
        if let Some(span) = context.lookup_current() {
            write!(writer, ",\"span\":{{\"name\":\"{}\"", span.name())?;
            if let Some(fields) = span.extensions().get::<FormattedFields<Self>>() {
                writer.write_str(fields)?;
            }
            writer.write_char('}')?;
        }
        writer.write_str("}\n")
    }
}

/// A visitor that writes fields as members of an object, each preceded by a comma.
struct JsonVisitor<'a> {
    writer: &'a mut dyn Write,
    result: fmt::Result,
}

impl JsonVisitor<'_> {
    fn add(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        if self.result.is_ok() {
            self.result = write!(self.writer, ",\"{}\":{value}", field.name());
        }
    }

    fn add_text(&mut self, field: &Field, text: fmt::Arguments<'_>) {
        if self.result.is_ok() {
            self.result = write!(self.writer, ",\"{}\":\"", field.name())
                .and_then(|()| JsonEscape(self.writer).write_fmt(text))
                .and_then(|()| self.writer.write_char('"'));
        }
    }
}

impl Visit for JsonVisitor<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN and no infinities.
        if value.is_finite() {
            self.add(field, format_args!("{value}"));
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, format_args!("{value}"));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, format_args!("{value}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add_text(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add_text(field, format_args!("{value:?}"));
    }
}

/// A writer that escapes text for a JSON string (RFC 8259, section 7).
struct JsonEscape<'a>(&'a mut dyn Write);

impl Write for JsonEscape<'_> {
    fn write_str(&mut self, mut text: &str) -> fmt::Result {
        // These bytes are never part of a multi-byte character.
        let is_special = |byte| matches!(byte, b'"' | b'\\' | 0..=0x1f);
        while let Some(at) = text.bytes().position(is_special) {
            self.0.write_str(&text[..at])?;
            match text.as_bytes()[at] {
                special @ (b'"' | b'\\') => write!(self.0, "\\{}", char::from(special))?,
                special => write!(self.0, "\\u{special:04x}")?,
            }
            text = &text[at + 1..];
        }
        self.0.write_str(text)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A writer that captures the log for the test.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic").extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_line_is_a_json_object_for_any_field_value() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .fmt_fields(JsonFormat)
            .event_format(JsonFormat)
            .finish();
        let evil = "a \"quote\", a \\, a\nline,\ta tab, \0, \u{1f}\u{7f}\u{2028} and é";
        tracing::subscriber::with_default(log, || {
            tracing::info!(good = true, "alone");
            let span = tracing::info_span!("call", peer = %evil, user_id = tracing::field::Empty);
            let _entered = span.enter();
            span.record("user_id", "ana");
            tracing::warn!(evil, debug = ?evil, much = u64::MAX, less = -1, ratio = 0.5, none = f64::NAN);
        });
        let text = String::from_utf8(lines.0.lock().expect("no panic").clone()).expect("text");
        let [alone, within] =
            &*text.lines().map(|line| serde_json::from_str(line).expect(line)).collect::<Vec<_>>()
        else {
            panic!("not two lines: {text}");
        };
        let without_time = |line: &serde_json::Value| {
            let mut line = line.clone();
            let time = line.as_object_mut().expect("an object").remove("timestamp");
            let time =
                time.as_ref().and_then(serde_json::Value::as_str).expect("a time").to_owned();
            assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
            line
        };
        let target = module_path!();
        let expected = serde_json::json!(
            { "level": "INFO", "message": "alone", "good": true, "target": target });
        assert_eq!(without_time(alone), expected);
        let expected = serde_json::json!({
            "level": "WARN", "evil": evil, "debug": format!("{evil:?}"), "much": u64::MAX,
            "less": -1, "ratio": 0.5, "target": target,
            "span": { "name": "call", "peer": evil, "user_id": "ana" },
        });
        assert_eq!(without_time(within), expected);
    }
}
