//! A call on its way through the layers, and what its metadata contains.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use hyper::body::Incoming;
use ipnet::IpNet;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::task_tracker::TaskTrackerToken;
use uuid::Uuid;

use super::Context;
use crate::{
    auth::watches::CredentialWatch,
    limits::{
        MAX_CALL_TIMEOUT,
        admission::{MemoryReservation, StreamPermit},
        client_quota::ClientQuota,
    },
    rpc::{
        caller::ClientIp, error::Error, open_stream::OpenStream, policy::Method,
        validation::FieldViolations,
    },
    transport::{ConnectionState, Inbound},
    types::invalid::InvalidValue,
};

/// The metadata entry that identifies a call.
pub(super) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest request id of a client that is accepted, in characters.
///
/// Test: `a_valid_request_id_is_taken_over`.
const MAX_REQUEST_ID_LEN: usize = 128;

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The metadata entry in which each proxy appends the address of its client.
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// A call. The layers fill what they find out, and take what they need.
#[derive(Debug)]
pub(super) struct Call<B = Incoming> {
    pub(super) context: Arc<Context>,
    pub(super) request: Request<B>,
    pub(super) connection: Arc<ConnectionState>,
    /// The quota of the client.
    pub(super) quota: Arc<ClientQuota>,
    /// `None` if the server has no such method.
    pub(super) method: Option<Method>,
    pub(super) client_ip: IpAddr,
    pub(super) request_id: HeaderValue,
    /// The client's timeout, if it sent one. An invalid one is reported after authentication.
    pub(super) timeout: Result<Option<Duration>, FieldViolations>,
    pub(super) received_at: Instant,
    /// Counts the call until its response is sent. Load shedding takes it.
    pub(super) in_flight: Option<InFlight>,
    /// What load shedding acquired for a response that is not buffered.
    pub(super) stream_guards: Option<StreamGuards>,
    /// The message of the request, with its prefix, if it is compressed. The body is empty then.
    pub(super) compressed: Option<Vec<u8>>,
    /// The credential behind a stream, which ends with it.
    pub(super) stream_credential: Option<StreamCredential>,
    /// What the layers share with the handler of a stream of the API.
    pub(super) open_stream: Option<OpenStream>,
}

/// The call's entries in the trackers that a shutdown and a draining connection wait for.
#[derive(Debug)]
pub(super) struct InFlight {
    _server: TaskTrackerToken,
    _connection: TaskTrackerToken,
}

/// What an open stream holds until it is sent.
#[derive(Debug)]
pub(super) struct StreamGuards {
    pub(super) _permit: StreamPermit,
    /// Of a reflection stream. The permit of another stream stands for its memory.
    pub(super) _memory: Option<MemoryReservation>,
    pub(super) _in_flight: Option<InFlight>,
}

/// What a stream of an authenticated caller depends on.
#[derive(Debug)]
pub(super) struct StreamCredential {
    /// Until when the server accepts the token, by its clock and as monotonic time.
    pub(super) accepted_until: (OffsetDateTime, Instant),
    pub(super) watch: CredentialWatch,
}

impl StreamCredential {
    /// Waits until the server accepts the token no longer. Returns the time.
    pub(super) async fn expired(&self) -> OffsetDateTime {
        let (until, instant) = self.accepted_until;
        sleep_until(instant).await;
        until
    }
}

impl Call {
    /// Reads the metadata of a request, and counts the call.
    pub(super) fn new(inbound: Inbound, context: Arc<Context>) -> Self {
        let Inbound { mut request, connection } = inbound;
        let received_at = Instant::now();
        let in_flight =
            InFlight { _server: context.calls.token(), _connection: connection.calls.token() };
        let headers = request.headers();
        let request_id = request_id(headers);
        let timeout = grpc_timeout(headers);
        let client_ip = client_ip(headers, connection.peer_ip, &context.trusted_proxies);
        let quota = if client_ip == connection.peer_ip {
            connection.quota.clone()
        } else {
            context.quotas.get(client_ip)
        };
        // A path with a query names no method.
        let uri = request.uri();
        let method = context.methods.get(uri.path()).filter(|_| uri.query().is_none());
        let via_trusted_proxy = is_trusted(connection.peer_ip, &context.trusted_proxies);
        request.extensions_mut().insert(ClientIp { ip: client_ip, via_trusted_proxy });
        let is_api_stream =
            method.is_some_and(|method| method.server_streaming && method.system.is_none());
        let open_stream = is_api_stream.then(OpenStream::default);
        if let Some(stream) = &open_stream {
            request.extensions_mut().insert(stream.clone());
        }
        Self {
            context,
            request,
            connection,
            quota,
            method,
            client_ip,
            request_id,
            timeout,
            received_at,
            in_flight: Some(in_flight),
            stream_guards: None,
            compressed: None,
            stream_credential: None,
            open_stream,
        }
    }
}

impl<B> Call<B> {
    /// Returns the call with another body.
    pub(super) fn map_body<C>(self, map: impl FnOnce(B) -> C) -> Call<C> {
        Call {
            context: self.context,
            request: self.request.map(map),
            connection: self.connection,
            quota: self.quota,
            method: self.method,
            client_ip: self.client_ip,
            request_id: self.request_id,
            timeout: self.timeout,
            received_at: self.received_at,
            in_flight: self.in_flight,
            stream_guards: self.stream_guards,
            compressed: self.compressed,
            stream_credential: self.stream_credential,
            open_stream: self.open_stream,
        }
    }

    /// Returns `true` if the response is a stream.
    pub(super) fn is_stream(&self) -> bool {
        self.method.is_some_and(|method| method.server_streaming)
    }

    /// Returns the time when the client stops waiting, if it sent a timeout.
    pub(super) fn client_deadline(&self) -> Option<Instant> {
        Some(self.received_at + self.client_timeout()?)
    }

    fn client_timeout(&self) -> Option<Duration> {
        self.timeout.as_ref().ok().copied().flatten()
    }

    /// Returns the time when the response headers are due: by the client's timeout or
    /// [`MAX_CALL_TIMEOUT`], whichever is shorter.
    pub(super) fn deadline(&self) -> Instant {
        self.received_at + effective_timeout(self.client_timeout())
    }

    /// Rejects a call with an invalid `grpc-timeout`.
    pub(super) fn check_timeout(&mut self) -> Result<(), Error> {
        match &mut self.timeout {
            Ok(_) => Ok(()),
            Err(violations) => Err(std::mem::take(violations).into()),
        }
    }
}

/// Returns the client's request id, if it is valid, or a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_valid = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=MAX_REQUEST_ID_LEN).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    if let Some(id) = headers.get(X_REQUEST_ID).filter(is_valid) {
        return id.clone();
    }
    let id = Uuid::now_v7().hyphenated().to_string();
    HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("none"))
}

/// Returns the client's timeout, if it sent one.
fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, FieldViolations> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else {
        return Ok(None);
    };
    let timeout = value.to_str().ok().and_then(parse_timeout).ok_or_else(|| {
        let allowed = InvalidValue::new("must be up to 8 digits and one of the units H M S m u n");
        FieldViolations::single("grpc-timeout", allowed)
    })?;
    Ok(Some(timeout))
}

fn effective_timeout(timeout: Option<Duration>) -> Duration {
    timeout.map_or(MAX_CALL_TIMEOUT, |timeout| timeout.min(MAX_CALL_TIMEOUT))
}

/// Parses `Timeout` of the gRPC protocol over HTTP/2.
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

/// Some proxies append the port, too.
fn parse_forwarded_addr(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| text.parse().ok().map(|addr: SocketAddr| addr.ip()))
}

fn is_trusted(ip: IpAddr, trusted_proxies: &[IpNet]) -> bool {
    trusted_proxies.iter().any(|network| network.contains(&ip))
}

/// Returns the client's address: that of the peer, or the one that trusted proxies report. Each
/// proxy appends the address that it received the call from; a client may have forged what stands
/// before an address that is not trusted.
fn client_ip(headers: &HeaderMap, peer_ip: IpAddr, trusted_proxies: &[IpNet]) -> IpAddr {
    let entries = headers.get_all(X_FORWARDED_FOR).iter().rev();
    // By bytes: an entry that is not text does not hide what a proxy appended after it.
    let mut addresses = entries.flat_map(|entry| entry.as_bytes().rsplit(|byte| *byte == b','));
    let mut client_ip = peer_ip;
    while is_trusted(client_ip, trusted_proxies)
        && let Some(address) = addresses.next()
    {
        let address = str::from_utf8(address).ok();
        let Some(address) = address.and_then(|text| parse_forwarded_addr(text.trim())) else {
            break;
        };
        client_ip = address.to_canonical();
    }
    client_ip
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_bytes(value.as_bytes()).expect("a header"))])
    }

    #[test]
    fn the_shorter_timeout_counts() {
        assert_eq!(effective_timeout(None), MAX_CALL_TIMEOUT);
        for (value, expected) in [
            ("1H", MAX_CALL_TIMEOUT),
            ("99999999H", MAX_CALL_TIMEOUT),
            ("6S", MAX_CALL_TIMEOUT),
            ("4S", Duration::from_secs(4)),
            ("0m", Duration::ZERO),
        ] {
            let read = grpc_timeout(&headers(GRPC_TIMEOUT, value)).expect("valid");
            assert_eq!(effective_timeout(read), expected, "{value}");
        }
    }

    #[test]
    fn a_timeout_has_a_unit() {
        assert_eq!(grpc_timeout(&HeaderMap::new()).expect("valid"), None);
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
            let read = grpc_timeout(&headers(GRPC_TIMEOUT, value)).expect("valid");
            assert_eq!(read, Some(expected), "{value}");
        }
        for invalid in ["", "1", "S", "1s", "-1S", "+1S", " 1S", "1 S", "1.5S", "123456789S", "1é"]
        {
            let rejected = grpc_timeout(&headers(GRPC_TIMEOUT, invalid));
            assert!(rejected.is_err(), "{invalid}");
        }
    }

    #[test]
    fn a_valid_request_id_is_taken_over() {
        for valid in ["a", "req-1/2:3~", &"x".repeat(128)] {
            assert_eq!(request_id(&headers(X_REQUEST_ID, valid)), valid);
        }
        for invalid in ["", "a b", "\u{e9}", &"x".repeat(129)] {
            let made = request_id(&headers(X_REQUEST_ID, invalid));
            assert_ne!(made, invalid);
            assert_eq!(made.len(), 36);
        }
    }

    proptest! {
        #[test]
        fn a_timeout_is_a_count_of_its_unit(
            count in prop_oneof![0_u64..10, 0_u64..10_000, 0_u64..100_000_000], width in 1_usize..=8, unit in 0_usize..6
        ) {
            let (unit, nanoseconds) = [
                ("H", 3_600_000_000_000), ("M", 60_000_000_000), ("S", 1_000_000_000),
                ("m", 1_000_000), ("u", 1_000), ("n", 1_u128),
            ][unit];
            let value = format!("{count:0width$}{unit}");
            let read = grpc_timeout(&headers(GRPC_TIMEOUT, &value)).expect("valid");
            let expected = u128::from(count) * nanoseconds;
            prop_assert_eq!(read.map(|timeout| timeout.as_nanos()), Some(expected));
            prop_assert_eq!(effective_timeout(read).as_nanos(), expected.min(MAX_CALL_TIMEOUT.as_nanos()));
        }

        #[test]
        fn any_request_id_is_taken_over_or_replaced(
            id in prop_oneof!["[!-~]{0,140}", "[ -~]{0,40}", "[ -~é🦀]{0,10}"]
        ) {
            let visible = id.bytes().all(|byte| (b'!'..=b'~').contains(&byte));
            let is_valid = visible && (1..=MAX_REQUEST_ID_LEN).contains(&id.len());
            let taken = request_id(&headers(X_REQUEST_ID, &id));
            prop_assert_eq!(taken == id.as_str(), is_valid);
            prop_assert!(!taken.is_empty() && taken.len() <= MAX_REQUEST_ID_LEN);
        }

        #[test]
        fn any_timeout_is_parsed_or_rejected(value in "[ -~]{0,12}") {
            let _ = grpc_timeout(&headers(GRPC_TIMEOUT, &value));
        }
    }
}
