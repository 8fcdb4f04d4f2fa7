//! The log for programs.

use std::fmt::{self, Write};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

/// What the fields of most spans and events need, in bytes.
const FIELDS_CAPACITY: usize = 384;

/// The JSON format: one object per event and line, with the fields of the event's span in
/// `span`. It formats the fields of a span once for all lines, whereas the JSON format of
/// `tracing-subscriber` parses them into a tree for each line: with that one, a GetTodo takes 20 %
/// more instructions in user space.
pub(super) struct JsonFormat;

impl<'writer> FormatFields<'writer> for JsonFormat {
    fn format_fields<F: RecordFields>(
        &self,
        mut writer: Writer<'writer>,
        fields: F,
    ) -> fmt::Result {
        // Written at once: the buffer of a span's fields starts without capacity.
        let mut text = String::with_capacity(FIELDS_CAPACITY);
        let mut visitor = JsonVisitor { writer: &mut text, result: Ok(()) };
        fields.record(&mut visitor);
        visitor.result?;
        writer.write_str(&text)
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
    writer: &'a mut String,
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
struct JsonEscape<'a>(&'a mut String);

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
    use tracing_subscriber::fmt::Layer;

    use super::*;
    use crate::telemetry::log::capture;

    #[test]
    fn every_line_is_a_json_object_for_any_field_value() {
        let evil = "a \"quote\", a \\, a\nline,\ta tab, \0, \u{1f}\u{7f}\u{2028} and é";
        let layer = Layer::new().fmt_fields(JsonFormat).event_format(JsonFormat);
        let text = capture(layer, || {
            tracing::info!(good = true, "alone");
            let span = tracing::info_span!("call", peer = %evil, user_id = tracing::field::Empty);
            let _entered = span.enter();
            span.record("user_id", "ana");
            tracing::warn!(evil, debug = ?evil, much = u64::MAX, less = -1, ratio = 0.5, none = f64::NAN);
        });
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
