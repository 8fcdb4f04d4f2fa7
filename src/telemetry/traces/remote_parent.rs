//! The span of a client, from the metadata of its request (W3C Trace Context).

use http::HeaderMap;
use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator},
    trace::{SpanContext, TraceContextExt},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;

/// The longest `tracestate` that is propagated, in bytes: what W3C Trace Context (section
/// 3.3.1.5) requires. Each span that waits for its export holds it.
///
/// Test: `a_tracestate_is_propagated_up_to_its_maximum_length`.
const MAX_TRACESTATE_BYTES: usize = 512;

/// The metadata entries of W3C Trace Context.
const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// Returns the client's span, if the metadata contains exactly one well-formed `traceparent`
/// (W3C Trace Context, section 3.2).
#[must_use]
pub(crate) fn remote_parent(headers: &HeaderMap) -> Option<SpanContext> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    // The propagator also takes ids of other lengths, signs, and no flags.
    if !is_well_formed(value.to_str().ok()?) {
        return None;
    }
    let context = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &HeaderExtractor(headers));
    let parent = context.span().span_context().clone();
    parent.is_valid().then_some(parent)
}

/// Returns `true` if the first four fields have their lengths, in lowercase hexadecimal
/// digits. Later versions may add fields.
fn is_well_formed(traceparent: &str) -> bool {
    let mut fields = traceparent.split('-');
    let is_hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let is_field = |field: &str, len: usize| field.len() == len && field.bytes().all(is_hex);
    let has_fields = [2, 32, 16, 2]
        .into_iter()
        .all(|len| fields.next().is_some_and(|field| is_field(field, len)));
    has_fields && (!traceparent.starts_with("00") || fields.next().is_none())
}

struct HeaderExtractor<'a>(&'a HeaderMap);

impl Extractor for HeaderExtractor<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let value = self.0.get(key)?.to_str().ok()?;
        (key != TRACESTATE || value.len() <= MAX_TRACESTATE_BYTES).then_some(value)
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT, TRACESTATE]
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};
    use opentelemetry::trace::{SpanId, TraceState};
    use proptest::prelude::*;

    use super::*;

    const TRACE_ID: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
    const SPAN_ID: u64 = 0x00f0_67aa_0ba9_02b7;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let value = HeaderValue::from_bytes(value.as_bytes()).expect("a header");
        HeaderMap::from_iter([(HeaderName::from_static(name), value)])
    }

    /// Returns the trace id, the span id, and whether the client samples the trace.
    fn parse(headers: &HeaderMap) -> Option<(u128, u64, bool)> {
        let parent = remote_parent(headers)?;
        let trace_id = u128::from_be_bytes(parent.trace_id().to_bytes());
        let span_id = u64::from_be_bytes(parent.span_id().to_bytes());
        Some((trace_id, span_id, parent.is_sampled()))
    }

    #[test]
    fn a_well_formed_traceparent_is_the_parent() {
        let ids = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        // Later versions may define flags and add fields.
        for (value, sampled) in [
            (format!("00-{ids}-01"), true),
            (format!("00-{ids}-00"), false),
            (format!("00-{ids}-03"), true),
            (format!("00-{ids}-fe"), false),
            (format!("01-{ids}-01"), true),
            (format!("cc-{ids}-01-what-the-future-is"), true),
        ] {
            let expected = Some((TRACE_ID, SPAN_ID, sampled));
            assert_eq!(parse(&headers(TRACEPARENT, &value)), expected, "{value}");
        }
        for value in [
            String::new(),
            ids.to_owned(),
            format!("ff-{ids}-01"),
            format!("0-{ids}-01"),
            format!("00-{ids}-1"),
            format!("00-{ids}-01-"),
            format!("00-{ids}-01-more"),
            format!("cc-{ids}-01.more"),
            format!("00-{ids}-0g"),
            format!("00-{ids}-+1"),
            format!("00-{}-01", ids.to_uppercase()),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-4bf92f3577b34da6a3ce929d0e0e4736-{}-01", "0".repeat(16)),
            format!("00-{}-01", &ids[1..]),
            format!(" 00-{ids}-01"),
        ] {
            assert_eq!(parse(&headers(TRACEPARENT, &value)), None, "{value}");
        }
        let mut twice = headers(TRACEPARENT, &format!("00-{ids}-01"));
        twice.append(TRACEPARENT, twice[TRACEPARENT].clone());
        assert_eq!(parse(&twice), None);
        assert_eq!(parse(&HeaderMap::new()), None);
    }

    #[test]
    fn a_tracestate_is_propagated_up_to_its_maximum_length() {
        let state_of = |state: &str| {
            let mut headers =
                headers(TRACEPARENT, &format!("00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"));
            headers.extend(self::headers(TRACESTATE, state));
            remote_parent(&headers).expect("valid").trace_state().header()
        };
        assert_eq!(state_of("vendor=value"), "vendor=value");
        // A value has at most 256 characters.
        let longest = format!("a={},b={}", "x".repeat(252), "y".repeat(255));
        assert_eq!(longest.len(), MAX_TRACESTATE_BYTES);
        assert_eq!(state_of(&longest), longest);
        assert_eq!(state_of(&format!("{longest}x")), TraceState::NONE.header());
    }

    proptest! {
        #[test]
        fn any_span_is_parsed_as_it_is_written(
            trace_id in 1_u128.., span_id in 1_u64.., flags: u8, version in 0_u8..0xff
        ) {
            let value = format!("{version:02x}-{trace_id:032x}-{span_id:016x}-{flags:02x}");
            let expected = Some((trace_id, span_id, flags % 2 == 1));
            prop_assert_eq!(parse(&headers(TRACEPARENT, &value)), expected);
        }

        #[test]
        fn any_traceparent_is_parsed_or_ignored(
            value in prop_oneof![
                "[ -~]{0,60}",
                "[0-9a-g]{2}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-fA-F]{1,3}(-[ -~]{0,5})?",
            ],
            state in "[ -~]{0,20}",
        ) {
            let mut read = headers(TRACEPARENT, &value);
            read.extend(headers(TRACESTATE, &state));
            if let Some((trace_id, span_id, sampled)) = parse(&read) {
                prop_assert!(trace_id != 0 && span_id != 0);
                prop_assert_ne!(SpanId::from(span_id), SpanId::INVALID);
                let version = &value[..2];
                let ids = format!("{version}-{trace_id:032x}-{span_id:016x}-");
                prop_assert!(value.starts_with(&ids), "{}", value);
                let flags = u8::from_str_radix(&value[ids.len()..ids.len() + 2], 16);
                prop_assert_eq!(flags.map(|flags| flags % 2 == 1), Ok(sampled));
            }
        }
    }
}
