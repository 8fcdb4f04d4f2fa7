//! The log for people.

use std::fmt::{self, Write};

use time::OffsetDateTime;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
    span::Record,
};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, format::Writer},
    registry::LookupSpan,
};

use crate::telemetry::audit;

/// The pretty format: time of day in UTC, level, event, its fields, and the call's method and
/// request ID. The trace ID follows if the client sent one. The line of a call of a method of the
/// API, with a generated request ID and without a trace, has at most 120 columns.
///
/// Audit lines, and those from WARN on, also have the client's IP address.
pub(super) struct PrettyFormat;

/// Precedes the client's IP address in the formatted fields of a span, of which only some lines
/// show it. No field contains this character, because [`EscapeControl`] escapes it.
const CLIENT_IP_SEPARATOR: char = '\x1f';

const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

impl<S: Subscriber + for<'span> LookupSpan<'span>> FormatEvent<S, Self> for PrettyFormat {
    fn format_event(
        &self,
        context: &FmtContext<'_, S, Self>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let (level, target) = (*event.metadata().level(), event.metadata().target());
        let is_audit = target == audit::TARGET;
        let (dim, color, reset) =
            if writer.has_ansi_escapes() { (DIM, color_of(level), RESET) } else { ("", "", "") };
        let (hour, minute, second, milli) = OffsetDateTime::now_utc().time().as_hms_milli();
        write!(writer, "{dim}{hour:02}:{minute:02}:{second:02}.{milli:03}{reset} ")?;
        write!(writer, "{color}{level:>5}{reset}")?;
        let mut visitor = EventVisitor { writer: &mut writer, result: Ok(()) };
        event.record(&mut visitor);
        visitor.result?;
        writer.write_str(dim)?;
        if let Some(span) = context.lookup_current()
            && let Some(fields) = span.extensions().get::<FormattedFields<Self>>()
        {
            let (fields, client_ip) =
                fields.split_once(CLIENT_IP_SEPARATOR).unwrap_or((fields, ""));
            writer.write_str(fields)?;
            if is_audit || level <= Level::WARN {
                writer.write_str(client_ip)?;
            }
        }
        if is_audit || level != Level::INFO {
            write!(writer, " {target}")?;
        }
        writeln!(writer, "{reset}")
    }
}

fn color_of(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        _ => "\x1b[34m",
    }
}

impl<'writer> FormatFields<'writer> for PrettyFormat {
    fn format_fields<F: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: F,
    ) -> fmt::Result {
        let mut visitor = SpanVisitor { writer: &mut writer, has_parent: false, result: Ok(()) };
        fields.record(&mut visitor);
        visitor.result
    }

    fn add_fields(
        &self,
        current: &'writer mut FormattedFields<Self>,
        fields: &Record<'_>,
    ) -> fmt::Result {
        self.format_fields(current.as_writer(), fields)
    }
}

/// A visitor that writes the message and the other fields of an event.
struct EventVisitor<'a> {
    writer: &'a mut dyn Write,
    result: fmt::Result,
}

impl Visit for EventVisitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.result.is_ok() {
            self.result = match field.name() {
                "message" | "code" => write_value(self.writer, "", format_args!("{value:?}")),
                "duration_ms" => write_value(self.writer, "", format_args!("{value:?} ms")),
                name => write_value(self.writer, name, format_args!("{value:?}")),
            };
        }
    }
}

/// A visitor that writes the fields of a call that people read. The client's IP address is the
/// last of them.
struct SpanVisitor<'a> {
    writer: &'a mut dyn Write,
    /// Whether the client sent a trace.
    has_parent: bool,
    result: fmt::Result,
}

impl Visit for SpanVisitor<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        let value = match (field.name(), value.rsplit_once('.')) {
            ("method", Some((_package, name))) => name,
            _ => value,
        };
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.result.is_err() {
            return;
        }
        self.result = match field.name() {
            "method" | "request_id" => write_value(self.writer, "", format_args!("{value:?}")),
            "trace_id" if self.has_parent => {
                write_value(self.writer, "trace_id", format_args!("{value:?}"))
            }
            "parent_span_id" => {
                self.has_parent = true;
                Ok(())
            }
            "client_ip" => self
                .writer
                .write_char(CLIENT_IP_SEPARATOR)
                .and_then(|()| write_value(self.writer, "client_ip", format_args!("{value:?}"))),
            _ => Ok(()),
        };
    }
}

/// Writes a value, after its name if it has one.
fn write_value(writer: &mut dyn Write, name: &str, value: fmt::Arguments<'_>) -> fmt::Result {
    writer.write_char(' ')?;
    if !name.is_empty() {
        write!(writer, "{name}=")?;
    }
    EscapeControl(writer).write_fmt(value)
}

/// A writer that escapes control characters, which a terminal would obey.
struct EscapeControl<'a>(&'a mut dyn Write);

impl Write for EscapeControl<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|char| {
            if char.is_control() {
                write!(self.0, "{}", char.escape_debug())
            } else {
                self.0.write_char(char)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use tracing::field;
    use tracing_subscriber::fmt::Layer;

    use super::*;
    use crate::telemetry::log::capture;

    const REQUEST_ID: &str = "01a22654-a40f-74a2-ab6c-4c3ee3fdfd25";

    fn lines_of_a_call(parent_span_id: Option<&str>) -> Vec<String> {
        let layer = Layer::new().with_ansi(false).fmt_fields(PrettyFormat);
        let text = capture(layer.event_format(PrettyFormat), || {
            let span = tracing::error_span!(
                "call",
                method = "fastzero.auth.v1.AuthService/IntrospectToken",
                request_id = REQUEST_ID,
                parent_span_id,
                trace_id = "4bf92f3577b34da6a3ce929d0e0e4736",
                client_ip = "2001:db8::1",
                user_id = field::Empty,
            );
            let _entered = span.enter();
            span.record("user_id", "01a22654-a410-72f8-bddd-4b3155083e8c");
            tracing::info!(code = "RESOURCE_EXHAUSTED", duration_ms = 12_345.679, "call");
            tracing::warn!(error = %"a\nb \x1b[0m", "it failed");
            audit::record("user_deleted", None, None);
        });
        text.lines().map(|line| line[TIME_LEN..].to_owned()).collect()
    }

    /// `08:03:31.006 `
    const TIME_LEN: usize = 13;

    #[test]
    fn a_call_fits_120_columns_and_other_lines_show_the_client() {
        let [call, warning, audit] = &*lines_of_a_call(None) else { panic!("not three lines") };
        let expected = format!(
            " INFO call RESOURCE_EXHAUSTED 12345.679 ms AuthService/IntrospectToken {REQUEST_ID}"
        );
        assert_eq!(*call, expected);
        assert!(TIME_LEN + call.len() <= 120, "{}", call.len());
        let expected = format!(
            " WARN it failed error=a\\nb \\u{{1b}}[0m AuthService/IntrospectToken {REQUEST_ID} \
             client_ip=2001:db8::1 {}",
            module_path!()
        );
        assert_eq!(*warning, expected);
        let expected = format!(
            " INFO audit event=user_deleted AuthService/IntrospectToken {REQUEST_ID} \
             client_ip=2001:db8::1 fast_zero::audit"
        );
        assert_eq!(*audit, expected);
    }

    #[test]
    fn the_trace_of_a_client_is_shown() {
        let [call, ..] = &*lines_of_a_call(Some("00f067aa0ba902b7")) else {
            panic!("not three lines")
        };
        assert!(call.ends_with(" trace_id=4bf92f3577b34da6a3ce929d0e0e4736"), "{call}");
    }
}
