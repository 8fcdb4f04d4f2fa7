//! What the metadata of a call say about it.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::Uuid;

use crate::{
    error::Error, traces::CallerSpan, types::invalid::InvalidValue, validation::FieldViolations,
};

/// The metadata entry that names a call: the caller's choice or ours.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest request id that is taken over, in characters.
const MAX_REQUEST_ID_LENGTH: usize = 128;

/// How long a call may take, if the caller does not want it shorter. No call of this
/// service has anything to do for as long as this.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(5);

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The metadata entry that names the caller's span (W3C Trace Context), and the one with what
/// others note of the trace.
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACE_STATE: HeaderName = HeaderName::from_static("tracestate");

/// The metadata entry in which each proxy notes whom it speaks for.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The caller's request id, if it is one, or a new one.
pub(super) fn request_id(headers: &HeaderMap) -> HeaderValue {
    let visible = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=MAX_REQUEST_ID_LENGTH).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    if let Some(id) = headers.get(REQUEST_ID).filter(visible) {
        return id.clone();
    }
    let id = Uuid::now_v7().hyphenated().to_string();
    HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("none"))
}

/// How long the caller waits at the most, if it says so.
pub(super) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else {
        return Ok(None);
    };
    let timeout = value.to_str().ok().and_then(parse_timeout).ok_or_else(|| {
        let allowed = InvalidValue::new("must be up to 8 digits and one of the units H M S m u n");
        Error::from(FieldViolations::single("grpc-timeout", allowed))
    })?;
    Ok(Some(timeout))
}

/// The caller's timeout or the default one, whichever is shorter.
pub(super) fn deadline(timeout: Option<Duration>) -> Duration {
    timeout.map_or(DEFAULT_DEADLINE, |timeout| timeout.min(DEFAULT_DEADLINE))
}

/// `Timeout` of the gRPC protocol over HTTP/2.
fn parse_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let is_number =
        (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    let count = digits.parse().ok().filter(|_| is_number)?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3_600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// The caller's span, if the metadata name one.
pub(super) fn caller_span(headers: &HeaderMap) -> Option<CallerSpan<'_>> {
    let mut values = headers.get_all(TRACE_PARENT).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let state = headers.get(TRACE_STATE).and_then(|state| state.to_str().ok());
    parse_trace_parent(value.to_str().ok()?, state.unwrap_or_default())
}

/// `traceparent` of W3C's Trace Context, section 3.2. Versions to come may have more to say,
/// after the parts of this one.
fn parse_trace_parent<'a>(value: &str, state: &'a str) -> Option<CallerSpan<'a>> {
    let mut parts = value.split('-');
    let mut number = |length| {
        let digits = parts.next().filter(|digits| digits.len() == length)?;
        let is_hex = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        u128::from_str_radix(digits, 16).ok().filter(|_| digits.bytes().all(is_hex))
    };
    let version = number(2).filter(|version| *version != 0xff)?;
    let trace_id = number(32).filter(|id| *id != 0)?;
    let span_id = number(16).and_then(|id| u64::try_from(id).ok()).filter(|id| *id != 0)?;
    let sampled = number(2)? & 1 == 1;
    let is_whole = version != 0 || parts.next().is_none();
    is_whole.then_some(CallerSpan { trace_id, span_id, sampled, state })
}

/// Some proxies note the port, too.
fn address_of(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| text.parse().ok().map(|peer: SocketAddr| peer.ip()))
}

/// Who calls: the one that connected, or whom trusted proxies name. Each adds whom it
/// heard the call from at the end; what comes before an address that is not trusted
/// may be made up.
pub(super) fn peer(
    headers: &HeaderMap,
    connected: IpAddr,
    trusts: impl Fn(IpAddr) -> bool,
) -> IpAddr {
    let entries = headers.get_all(FORWARDED_FOR).iter().rev();
    // By bytes: what is no text spoils itself only, not what a proxy wrote after it.
    let mut addresses = entries.flat_map(|entry| entry.as_bytes().rsplit(|byte| *byte == b','));
    let mut peer = connected;
    while trusts(peer)
        && let Some(address) = addresses.next()
    {
        let address = str::from_utf8(address).ok().and_then(|text| address_of(text.trim()));
        let Some(address) = address else {
            break;
        };
        peer = address.to_canonical();
    }
    peer
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_bytes(value.as_bytes()).expect("a header"))])
    }

    #[test]
    fn the_shorter_deadline_counts() {
        assert_eq!(deadline(None), DEFAULT_DEADLINE);
        for (value, expected) in [
            ("1H", DEFAULT_DEADLINE),
            ("99999999H", DEFAULT_DEADLINE),
            ("6S", DEFAULT_DEADLINE),
            ("4S", Duration::from_secs(4)),
            ("0m", Duration::ZERO),
        ] {
            let read = timeout(&headers(GRPC_TIMEOUT, value)).expect("good");
            assert_eq!(deadline(read), expected, "{value}");
        }
    }

    #[test]
    fn a_timeout_has_a_unit() {
        assert_eq!(timeout(&HeaderMap::new()).expect("good"), None);
        for (value, expected) in [
            ("1H", Duration::from_hours(1)),
            ("99999999H", Duration::from_hours(99_999_999)),
            ("2M", Duration::from_mins(2)),
            ("4S", Duration::from_secs(4)),
            ("250m", Duration::from_millis(250)),
            ("7u", Duration::from_micros(7)),
            ("9n", Duration::from_nanos(9)),
            ("0m", Duration::ZERO),
        ] {
            let read = timeout(&headers(GRPC_TIMEOUT, value)).expect("good");
            assert_eq!(read, Some(expected), "{value}");
        }
        for bad in ["", "1", "S", "1s", "-1S", "+1S", " 1S", "1 S", "1.5S", "123456789S", "1é"] {
            let refused = timeout(&headers(GRPC_TIMEOUT, bad));
            assert!(matches!(refused, Err(Error::InvalidRequest(_))), "{bad}");
        }
    }

    #[test]
    fn a_request_id_is_taken_over_if_it_is_one() {
        for good in ["a", "req-1/2:3~", &"x".repeat(128)] {
            assert_eq!(request_id(&headers(REQUEST_ID, good)), good);
        }
        for bad in ["", "a b", "\u{e9}", &"x".repeat(129)] {
            let made = request_id(&headers(REQUEST_ID, bad));
            assert_ne!(made, bad);
            assert_eq!(made.len(), 36);
        }
    }

    const TRACE_ID: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
    const SPAN_ID: u64 = 0x00f0_67aa_0ba9_02b7;

    #[test]
    fn the_callers_span_is_taken_over_if_it_is_one() {
        let ids = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        // Flags may be added, and parts, in a version to come.
        for (good, sampled) in [
            (format!("00-{ids}-01"), true),
            (format!("00-{ids}-00"), false),
            (format!("00-{ids}-03"), true),
            (format!("00-{ids}-fe"), false),
            (format!("01-{ids}-01"), true),
            (format!("cc-{ids}-01-what-the-future-is"), true),
        ] {
            let read = headers(TRACE_PARENT, &good);
            let expected = CallerSpan { trace_id: TRACE_ID, span_id: SPAN_ID, sampled, state: "" };
            assert_eq!(caller_span(&read), Some(expected), "{good}");
        }
        for bad in [
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
            assert_eq!(caller_span(&headers(TRACE_PARENT, &bad)), None, "{bad}");
        }
        let mut twice = headers(TRACE_PARENT, &format!("00-{ids}-01"));
        twice.append(TRACE_PARENT, twice[TRACE_PARENT].clone());
        assert_eq!(caller_span(&twice), None);
        assert_eq!(caller_span(&HeaderMap::new()), None);
    }

    proptest! {
        #[test]
        fn any_span_is_read_as_it_is_written(
            trace_id in 1_u128.., span_id in 1_u64.., flags: u8, version in 0_u8..0xff
        ) {
            let value = format!("{version:02x}-{trace_id:032x}-{span_id:016x}-{flags:02x}");
            let sampled = flags % 2 == 1;
            let expected = CallerSpan { trace_id, span_id, sampled, state: "" };
            let read = headers(TRACE_PARENT, &value);
            prop_assert_eq!(caller_span(&read), Some(expected));
        }

        #[test]
        fn any_trace_parent_is_taken_over_or_replaced(
            value in prop_oneof![
                "[ -~]{0,60}",
                "[0-9a-g]{2}-[0-9a-f]{31,33}-[0-9a-f]{15,17}-[0-9a-fA-F]{1,3}(-[ -~]{0,5})?",
            ],
            state in "[ -~]{0,20}",
        ) {
            let mut read = headers(TRACE_PARENT, &value);
            read.extend(headers(TRACE_STATE, &state));
            if let Some(span) = caller_span(&read) {
                let CallerSpan { trace_id, span_id, sampled, .. } = span;
                prop_assert!(trace_id != 0 && span_id != 0);
                let version = &value[..2];
                let ids = format!("{version}-{trace_id:032x}-{span_id:016x}-");
                prop_assert!(value.starts_with(&ids), "{}", value);
                let flags = u8::from_str_radix(&value[ids.len()..ids.len() + 2], 16);
                prop_assert_eq!(flags.map(|flags| flags % 2 == 1), Ok(sampled));
                prop_assert_eq!(span.state, &*state);
            }
        }

        #[test]
        fn a_timeout_is_a_count_of_its_unit(
            count in prop_oneof![0_u64..10, 0_u64..10_000, 0_u64..100_000_000], width in 1_usize..=8, unit in 0_usize..6
        ) {
            let (unit, nanoseconds) = [
                ("H", 3_600_000_000_000), ("M", 60_000_000_000), ("S", 1_000_000_000),
                ("m", 1_000_000), ("u", 1_000), ("n", 1_u128),
            ][unit];
            let value = format!("{count:0width$}{unit}");
            let read = timeout(&headers(GRPC_TIMEOUT, &value)).expect("good");
            let expected = u128::from(count) * nanoseconds;
            prop_assert_eq!(read.map(|timeout| timeout.as_nanos()), Some(expected));
            prop_assert_eq!(deadline(read).as_nanos(), expected.min(DEFAULT_DEADLINE.as_nanos()));
        }

        #[test]
        fn any_request_id_is_taken_over_or_replaced(
            id in prop_oneof!["[!-~]{0,140}", "[ -~]{0,40}", "[ -~é🦀]{0,10}"]
        ) {
            let visible = id.bytes().all(|byte| (b'!'..=b'~').contains(&byte));
            let good = visible && (1..=MAX_REQUEST_ID_LENGTH).contains(&id.len());
            let taken = request_id(&headers(REQUEST_ID, &id));
            prop_assert_eq!(taken == id.as_str(), good);
            prop_assert!(!taken.is_empty() && taken.len() <= MAX_REQUEST_ID_LENGTH);
        }

        #[test]
        fn any_timeout_is_read_or_refused(value in "[ -~]{0,12}") {
            let _ = timeout(&headers(GRPC_TIMEOUT, &value));
        }
    }
}
