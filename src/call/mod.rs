//! What happens around every call, whatever its method: a request id, a trace, a
//! deadline, authentication, complete error details, one line in the log.

mod log;
mod metadata;
mod origin;
mod stream;

use std::{
    future::ready,
    net::IpAddr,
    sync::{Arc, OnceLock},
};

use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION};
use hyper::body::{Bytes, Incoming};
use ipnet::IpNet;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout_at},
};
use tokio_util::{either::Either, task::TaskTracker};
use tonic::{Status, body::Body, service::Routes};
use tower::Service;
use tracing::{Instrument, Span, field};

use self::{log::CallLog, origin::MAX_REFLECTION, stream::OpenBody};
use crate::{
    admission::{Admission, Room},
    auth::guard::{Access, Authenticator, Methods},
    caller::Peer,
    error::{self, Error},
    metrics::{Counted, Metrics},
    peers::{Peers, Share},
    traces::{self, Traces},
    types::error_chain::{BoxError, ErrorChain},
};

pub use self::{
    metadata::{DEFAULT_DEADLINE, REQUEST_ID},
    origin::{Origin, Sending},
};

/// Takes every call in.
#[derive(Debug)]
pub struct Gateway {
    methods: Methods,
    metrics: Arc<Metrics>,
    traces: Traces,
    admission: Admission,
    peers: Arc<Peers>,
    trusted_proxies: Vec<IpNet>,
    /// Health and reflection: there from the start.
    open: Routes,
    /// The services of the contract: there when the database is.
    api: OnceLock<Api>,
    calls: TaskTracker,
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
        peers: Arc<Peers>,
        trusted_proxies: Vec<IpNet>,
        metrics: Arc<Metrics>,
        traces: Traces,
    ) -> Self {
        Self {
            methods,
            admission: Admission::new(max_calls),
            metrics,
            peers,
            traces,
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

    /// Serves the contract from now on. May be called once; later calls change nothing.
    pub fn serve(&self, api: Api) {
        let _ = self.api.set(api);
    }

    /// Waits until no call is under way.
    pub async fn calls_end(&self) {
        self.calls.close();
        self.calls.wait().await;
    }

    fn share(&self, peer: IpAddr, origin: &Origin) -> Arc<Share> {
        if peer == origin.ip { origin.share.clone() } else { self.peers.share(peer) }
    }

    /// Answers a call. What it takes up is counted at once, and not when its task has its
    /// turn: many more may come until then. One that is refused costs no task that waits.
    pub fn answer(
        self: &Arc<Self>,
        mut request: Request<Incoming>,
        origin: &Arc<Origin>,
    ) -> impl Future<Output = Response<Body>> + Send + use<> {
        let came_at = Instant::now();
        let under_way = (self.calls.token(), origin.calls.token());
        let request_id = metadata::request_id(request.headers());
        let peer = metadata::peer(request.headers(), origin.ip, |ip| self.trusts(ip));
        request.extensions_mut().insert(Peer(peer));
        let access = self.methods.access(request.uri().path());
        let in_flight = Counted::by(&self.metrics.calls_in_flight);
        let id = request_id.to_str().unwrap_or_default();
        let caller = metadata::caller_span(request.headers());
        let of_probe = matches!(access, Some(Access::Health | Access::Reflection));
        let method = self.metrics.calls.of(request.uri().path()).clone();
        let trace = self.traces.begin(method.name(), id, caller, of_probe);
        // At the level of what is always logged: every line of the call is to name it.
        let span = tracing::error_span!(
            "call",
            method = log::method_name(request.uri().path()),
            request_id = id,
            trace_id = %trace.id(),
            peer = %peer,
            user_id = field::Empty,
        );
        let call = Call { origin: origin.clone(), share: self.share(peer, origin), request_id };
        let entry = match self.enter(access, &call, request.headers()) {
            Ok(entry) => entry,
            Err(refused) => {
                let _entered = span.enter();
                let log = CallLog::begin(of_probe, method, trace, in_flight);
                return Either::Left(ready(self.end(&call, Err(refused), log)));
            }
        };
        let (this, log_trace) = (self.clone(), trace.clone());
        // Boxed before anything is put around it: it is large, and would be moved each time.
        let answering = Box::pin(async move {
            let _under_way = under_way;
            let log = CallLog::begin(of_probe, method, log_trace, in_flight);
            let response = this.answer_in_time(request, &call, entry, came_at).await;
            this.end(&call, response, log)
        });
        Either::Right(trace.around(answering).instrument(span))
    }

    /// Completes the response, and logs and counts the error that it tells of, if any.
    fn end(
        &self,
        call: &Call,
        result: Result<Response<Body>, Error>,
        mut log: CallLog,
    ) -> Response<Body> {
        let mut response = result.unwrap_or_else(|error| Status::from(error).into_http());
        match error::error_of(&response) {
            Some(Error::Internal(cause)) => {
                tracing::error!(cause = %ErrorChain(&**cause), "internal error");
            }
            Some(Error::DatabaseUnavailable(cause)) => {
                tracing::warn!(cause = %ErrorChain(&**cause), "database unavailable");
            }
            Some(Error::Overloaded) => drop(self.metrics.calls_shed.inc()),
            _ => {}
        }
        log.code = error::complete_details(response.headers_mut(), call.id());
        response.headers_mut().insert(REQUEST_ID, call.request_id.clone());
        response
    }

    /// What a call with these headers needs before anything is done for it.
    fn enter(
        &self,
        access: Option<Access>,
        call: &Call,
        headers: &HeaderMap,
    ) -> Result<Entry, Error> {
        let admission = &self.admission;
        Ok(match access.ok_or(Error::Unimplemented)? {
            // Only a peer that has very many of them is turned away.
            Access::Health => Entry::Health(admission.enter_health(&call.share)?),
            Access::Reflection => {
                let room = admission.room_of_reflection(call.share.clone(), headers)?;
                Entry::Reflection(room, call.origin.streaming())
            }
            Access::Public => Entry::Public(admission.room(call.share.clone(), headers)?),
            // At the start, that there is no database comes first.
            Access::Caller if self.api.get().is_some() && !headers.contains_key(AUTHORIZATION) => {
                return Err(Error::NotAuthenticated);
            }
            Access::Caller => Entry::Caller(admission.room(call.share.clone(), headers)?),
        })
    }

    async fn answer_in_time(
        &self,
        request: Request<Incoming>,
        call: &Call,
        entry: Entry,
        came_at: Instant,
    ) -> Result<Response<Body>, Error> {
        let timeout = metadata::timeout(request.headers());
        // Of a stream, which has no other limit but its own.
        let lifetime = timeout.as_ref().ok().copied().flatten();
        let limit = metadata::deadline(lifetime);
        let deadline = timeout.map(drop);
        let route = async {
            match entry {
                Entry::Health(place) => {
                    deadline?;
                    let kept = (place, call.share.clone());
                    let end = lifetime.map(|lifetime| came_at + lifetime);
                    Ok(self.answer_openly(request, call, end, kept).await)
                }
                Entry::Reflection(room, streaming) => {
                    deadline?;
                    let kept = (room, streaming);
                    let lifetime = lifetime.unwrap_or(MAX_REFLECTION).min(MAX_REFLECTION);
                    Ok(self.answer_openly(request, call, Some(came_at + lifetime), kept).await)
                }
                Entry::Public(room) => self.admit(request, call, room, deadline, false).await,
                Entry::Caller(room) => self.admit(request, call, room, deadline, true).await,
            }
        };
        timeout_at(came_at + limit, route).await.map_err(|_| Error::DeadlineExceeded)?
    }

    /// Health and reflection, until `end`: `kept` is kept until the answer, which may be a
    /// stream, is whole.
    async fn answer_openly(
        &self,
        request: Request<Incoming>,
        call: &Call,
        end: Option<Instant>,
        kept: impl Send + Unpin + 'static,
    ) -> Response<Body> {
        let response = serve(self.open.clone(), request).await;
        let ending = call.origin.ending(end);
        let kept = (kept, self.calls.token(), call.origin.calls.token());
        response.map(|body| OpenBody::wrap(body, call.id(), ending, kept))
    }

    /// The one place that decides who gets through to the services of the contract.
    async fn admit(
        &self,
        request: Request<Incoming>,
        call: &Call,
        mut room: Room,
        deadline: Result<(), Error>,
        needs_caller: bool,
    ) -> Result<Response<Body>, Error> {
        // Before the call takes a place: who sends slowly holds up nobody.
        let mut request = self.admission.read(request, &mut room).await?;
        let large = if may_answer_much(request.uri().path()) {
            Some(self.admission.large_answer(&call.share).await?)
        } else {
            None
        };
        let place = self.admission.enter(&call.share).await?;
        let api = self.api.get();
        let api =
            api.ok_or_else(|| Error::DatabaseUnavailable("the service is starting".into()))?;
        if needs_caller {
            let caller = api.authenticator.authenticate(request.headers()).await?;
            Span::current().record("user_id", field::display(caller.user_id));
            traces::note_user(caller.user_id);
            request.extensions_mut().insert(caller);
        }
        // Only now: who may not call is not told what is wrong with the call.
        deadline?;
        let response = serve(api.routes.clone(), request).await;
        drop(place);
        let kept = (call.origin.sending(), self.calls.token(), call.origin.calls.token());
        self.admission.answer(response, room, large, kept).await
    }
}

/// What is known of a call before it is let in.
struct Call {
    origin: Arc<Origin>,
    /// The share of whoever calls.
    share: Arc<Share>,
    request_id: HeaderValue,
}

impl Call {
    fn id(&self) -> &str {
        self.request_id.to_str().unwrap_or_default()
    }
}

/// What a call got when it came, by what its method asks for.
enum Entry {
    Health(OwnedSemaphorePermit),
    Reflection(Room, Sending),
    Public(Room),
    Caller(Room),
}

/// Whether the answer of the method at a path may be large: those that list.
fn may_answer_much(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|method| method.starts_with("List"))
}

async fn serve<B>(mut routes: Routes, request: Request<B>) -> Response<Body>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    match routes.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
