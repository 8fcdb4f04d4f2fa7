//! What happens around every call, whatever its method: a request id, a deadline,
//! authentication, complete error details, one line in the log.

use std::{
    net::IpAddr,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Frame;
use hyper::body::Incoming;
use ipnet::IpNet;
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tonic::{Code, Status, body::Body, service::Routes};
use tower::Service;
use tracing::{Instrument, Span, field};
use uuid::Uuid;

use crate::{
    admission::Admission,
    auth::guard::{Access, Authenticator, Methods},
    caller::Peer,
    error::{self, Error},
    metrics::{Counted, Method, Metrics},
    validation::{Invalid, Violations},
};

/// The metadata entry that names a call: the caller's choice or ours.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The longest request id that is taken over, in characters.
const MAX_REQUEST_ID_LENGTH: usize = 128;

/// The longest name of a method that is logged, in bytes.
const MAX_METHOD_LENGTH: usize = 128;

/// How long a call may take, if the caller does not want it shorter. No call of this
/// service has anything to do for as long as this.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(5);

const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The metadata entry in which each proxy notes whom it speaks for.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Takes every call in.
#[derive(Debug)]
pub struct Gateway {
    methods: Methods,
    metrics: Arc<Metrics>,
    admission: Admission,
    trusted_proxies: Vec<IpNet>,
    /// Health and reflection: there from the start.
    open: Routes,
    /// The services of the contract: there when the database is.
    api: OnceLock<Api>,
    calls: TaskTracker,
}

/// The connection over which a call comes.
#[derive(Debug)]
pub struct Origin {
    ip: IpAddr,
    calls: TaskTracker,
    /// Cancelled when the connection is told to end: streams do.
    ending: CancellationToken,
    /// Cancelled when an answer is not read.
    stuck: CancellationToken,
}

impl Origin {
    /// A connection from this address, whose streams end when `ending` is cancelled.
    #[must_use]
    pub fn new(ip: IpAddr, ending: CancellationToken) -> Self {
        Self { ip, calls: TaskTracker::new(), ending, stuck: CancellationToken::new() }
    }

    /// Whether no call is under way on it.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.calls.is_empty()
    }

    /// Waits until an answer is not read in time.
    pub async fn is_stuck(&self) {
        self.stuck.cancelled().await;
    }
}

/// The services of the contract, and who may call them.
#[derive(Debug)]
pub struct Api {
    /// Finds out who calls.
    pub authenticator: Arc<Authenticator>,
    /// The services.
    pub routes: Routes,
}

impl Gateway {
    /// Serves `open` only. Takes the word of `trusted_proxies` for whom they speak.
    #[must_use]
    pub fn new(
        methods: Methods,
        open: Routes,
        max_calls: usize,
        trusted_proxies: Vec<IpNet>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            methods,
            admission: Admission::new(max_calls, metrics.calls_shed.clone()),
            metrics,
            trusted_proxies,
            open,
            api: OnceLock::new(),
            calls: TaskTracker::new(),
        }
    }

    /// Whether this is the address of a proxy that is to be believed.
    #[must_use]
    pub fn trusts(&self, ip: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|network| network.contains(&ip))
    }

    /// Who calls: the one that connected, or whom trusted proxies name. Each adds whom it
    /// heard the call from at the end; what comes before an address that is not trusted
    /// may be made up.
    fn peer(&self, headers: &HeaderMap, connected: IpAddr) -> IpAddr {
        let entries = headers.get_all(FORWARDED_FOR).iter().rev();
        // By bytes: what is no text spoils itself only, not what a proxy wrote after it.
        let mut addresses = entries.flat_map(|entry| entry.as_bytes().rsplit(|byte| *byte == b','));
        let mut peer = connected;
        while self.trusts(peer)
            && let Some(address) = addresses.next()
        {
            let address = str::from_utf8(address).ok().and_then(|text| text.trim().parse().ok());
            let Some(address): Option<IpAddr> = address else {
                break;
            };
            peer = address.to_canonical();
        }
        peer
    }

    /// Serves the contract from now on. May be called once; later calls change nothing.
    pub fn serve(&self, api: Api) {
        let _ = self.api.set(api);
    }

    /// Waits until no call is under way.
    pub async fn calls_end(&self) {
        self.calls.close();
        self.calls.wait().await;
    }

    /// Answers a call.
    pub async fn answer(&self, mut request: Request<Incoming>, origin: &Origin) -> Response<Body> {
        let _under_way = (self.calls.token(), origin.calls.token());
        let request_id = request_id(request.headers());
        let peer = self.peer(request.headers(), origin.ip);
        request.extensions_mut().insert(Peer(peer));
        let access = self.methods.access(request.uri().path());
        let method = self.metrics.calls.of(request.uri().path());
        let in_flight = Counted::by(&self.metrics.calls_in_flight);
        let span = tracing::info_span!(
            "call",
            method = method_name(request.uri().path()),
            request_id = request_id.to_str().unwrap_or_default(),
            peer = %peer,
            user_id = field::Empty,
        );
        async {
            let mut log = CallLog::begin(access, method, in_flight);
            let id = request_id.to_str().unwrap_or_default();
            let response = self.answer_in_time(request, origin, access, id).await;
            let mut response = response.unwrap_or_else(|error| Status::from(error).into_http());
            log.code = error::complete_details(response.headers_mut(), id);
            response.headers_mut().insert(REQUEST_ID, request_id.clone());
            response
        }
        .instrument(span)
        .await
    }

    async fn answer_in_time(
        &self,
        request: Request<Incoming>,
        origin: &Origin,
        access: Option<Access>,
        request_id: &str,
    ) -> Result<Response<Body>, Error> {
        let deadline = deadline(request.headers());
        let limit = *deadline.as_ref().unwrap_or(&DEFAULT_DEADLINE);
        let route = self.route(request, origin, access, request_id, deadline);
        tokio::time::timeout(limit, route).await.map_err(|_| Error::DeadlineExceeded)?
    }

    /// The one place that decides who gets through.
    async fn route(
        &self,
        mut request: Request<Incoming>,
        origin: &Origin,
        access: Option<Access>,
        request_id: &str,
        deadline: Result<Duration, Error>,
    ) -> Result<Response<Body>, Error> {
        let access = access.ok_or(Error::Unimplemented)?;
        if access == Access::Open {
            deadline?;
            let response = call(self.open.clone(), request).await;
            return Ok(response.map(|body| OpenBody::wrap(body, request_id, origin)));
        }
        let _admitted = self.admission.enter().await?;
        let api = self.api.get();
        let api =
            api.ok_or_else(|| Error::DatabaseUnavailable("the service is starting".into()))?;
        if access == Access::Caller {
            let caller = api.authenticator.authenticate(request.headers()).await?;
            Span::current().record("user_id", field::display(caller.user_id));
            request.extensions_mut().insert(caller);
        }
        // Only now: who may not call is not told what is wrong with the call.
        deadline?;
        let response = call(api.routes.clone(), request).await;
        self.admission.answer(response, &origin.stuck).await
    }
}

async fn call(mut routes: Routes, request: Request<Incoming>) -> Response<Body> {
    match routes.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// What the log calls a method. The path of one that does not exist may be as long as the
/// caller likes.
fn method_name(path: &str) -> &str {
    let name = path.strip_prefix('/').unwrap_or(path);
    &name[..name.floor_char_boundary(MAX_METHOD_LENGTH)]
}

/// The caller's request id, if it is one, or a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
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

/// The caller's deadline or the default one, whichever is shorter.
fn deadline(headers: &HeaderMap) -> Result<Duration, Error> {
    let Some(value) = headers.get(GRPC_TIMEOUT) else {
        return Ok(DEFAULT_DEADLINE);
    };
    let timeout = value.to_str().ok().and_then(parse_timeout).ok_or_else(|| {
        let allowed = Invalid::new("must be up to 8 digits and one of the units H M S m u n");
        Error::InvalidRequest(Violations::single("grpc-timeout", allowed))
    })?;
    Ok(timeout.min(DEFAULT_DEADLINE))
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

/// Writes the call's line and counts it when it ends, whichever way: a caller that goes
/// away drops it.
struct CallLog<'a> {
    begun: Instant,
    access: Option<Access>,
    method: &'a Method,
    code: Code,
    _in_flight: Counted,
}

impl<'a> CallLog<'a> {
    fn begin(access: Option<Access>, method: &'a Method, in_flight: Counted) -> Self {
        let (begun, code) = (Instant::now(), Code::Cancelled);
        Self { begun, access, method, code, _in_flight: in_flight }
    }
}

impl Drop for CallLog<'_> {
    fn drop(&mut self) {
        let duration = self.begun.elapsed();
        let duration_ms = duration.as_secs_f64() * 1_000.0;
        let code = self.code;
        self.method.count(code, duration);
        // Probes come every few seconds, for ever.
        if self.access == Some(Access::Open) {
            tracing::debug!(?code, duration_ms, "call");
        } else {
            tracing::info!(?code, duration_ms, "call");
        }
    }
}

/// The body of an answer of health or reflection, which may be a stream: errors at its
/// end get their details, and when the connection ends, it ends after what it had to say.
struct OpenBody {
    /// `None` after the end.
    body: Option<Body>,
    request_id: String,
    ending: Pin<Box<WaitForCancellationFutureOwned>>,
    _under_way: TaskTrackerToken,
}

impl OpenBody {
    fn wrap(body: Body, request_id: &str, origin: &Origin) -> Body {
        Body::new(Self {
            body: Some(body),
            request_id: request_id.to_owned(),
            ending: Box::pin(origin.ending.clone().cancelled_owned()),
            _under_way: origin.calls.token(),
        })
    }
}

impl http_body::Body for OpenBody {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        let mut trailers = match Pin::new(body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_trailers() {
                Ok(trailers) => trailers,
                Err(data) => return Poll::Ready(Some(Ok(data))),
            },
            Poll::Ready(end) => return Poll::Ready(end),
            Poll::Pending => {
                ready!(self.ending.as_mut().poll(context));
                self.body = None;
                let response: Response<Body> = Status::from(Error::Stopping).into_http();
                response.into_parts().0.headers
            }
        };
        error::complete_details(&mut trailers, &self.request_id);
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }
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
        assert_eq!(deadline(&HeaderMap::new()).expect("good"), DEFAULT_DEADLINE);
        for (value, expected) in [
            ("1H", DEFAULT_DEADLINE),
            ("99999999H", DEFAULT_DEADLINE),
            ("6S", DEFAULT_DEADLINE),
            ("4S", Duration::from_secs(4)),
            ("250m", Duration::from_millis(250)),
            ("7u", Duration::from_micros(7)),
            ("9n", Duration::from_nanos(9)),
            ("0m", Duration::ZERO),
        ] {
            assert_eq!(deadline(&headers(GRPC_TIMEOUT, value)).expect("good"), expected, "{value}");
        }
        for bad in ["", "1", "S", "1s", "-1S", "+1S", " 1S", "1 S", "1.5S", "123456789S", "1é"] {
            let refused = deadline(&headers(GRPC_TIMEOUT, bad));
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
            let expected = (u128::from(count) * nanoseconds).min(DEFAULT_DEADLINE.as_nanos());
            let read = deadline(&headers(GRPC_TIMEOUT, &value)).expect("good");
            prop_assert_eq!(read.as_nanos(), expected);
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
            let _ = deadline(&headers(GRPC_TIMEOUT, &value));
        }
    }
}
