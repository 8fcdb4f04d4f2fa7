//! What happens around every call, whatever its method: a request id, a trace, a
//! deadline, authentication, complete error details, one line in the log.

mod log;
mod metadata;
mod origin;
mod stream;

use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use http::{Request, Response};
use hyper::body::{Bytes, Incoming};
use ipnet::IpNet;
use tokio_util::task::TaskTracker;
use tonic::{Status, body::Body, service::Routes};
use tower::Service;
use tracing::{Instrument, Span, field};

use self::{log::CallLog, stream::OpenBody};
use crate::{
    admission::Admission,
    auth::guard::{Access, Authenticator, Methods},
    caller::Peer,
    error::{self, Error},
    metrics::{Counted, Metrics},
    peers::{Peers, Share},
    traces::{self, Traces},
};

pub use self::{
    metadata::{DEFAULT_DEADLINE, REQUEST_ID},
    origin::{Origin, Sending},
};

/// How long a stream of reflection may be open: longer than any tool needs to ask all it
/// wants to know.
const MAX_REFLECTION: Duration = Duration::from_secs(30);

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
            admission: Admission::new(max_calls, metrics.calls_shed.clone()),
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

    /// Answers a call.
    pub async fn answer(
        &self,
        mut request: Request<Incoming>,
        origin: &Arc<Origin>,
    ) -> Response<Body> {
        let _under_way = (self.calls.token(), origin.calls.token());
        let request_id = metadata::request_id(request.headers());
        let peer = metadata::peer(request.headers(), origin.ip, |ip| self.trusts(ip));
        request.extensions_mut().insert(Peer(peer));
        let access = self.methods.access(request.uri().path());
        let method = self.metrics.calls.of(request.uri().path());
        let in_flight = Counted::by(&self.metrics.calls_in_flight);
        let id = request_id.to_str().unwrap_or_default();
        let caller = metadata::caller_span(request.headers());
        let of_probe = matches!(access, Some(Access::Health | Access::Reflection));
        let trace = self.traces.begin(method.name(), id, caller, of_probe);
        let span = tracing::info_span!(
            "call",
            method = log::method_name(request.uri().path()),
            request_id = id,
            trace_id = %trace.id(),
            peer = %peer,
            user_id = field::Empty,
        );
        let answering = trace.around(async {
            let share = self.share(peer, origin);
            let mut log = CallLog::begin(access, method, trace.clone(), in_flight);
            let call = Call { origin, share, access, request_id: id };
            let response = self.answer_in_time(request, call).await;
            let mut response = response.unwrap_or_else(|error| Status::from(error).into_http());
            log.code = error::complete_details(response.headers_mut(), id);
            response.headers_mut().insert(REQUEST_ID, request_id.clone());
            response
        });
        answering.instrument(span).await
    }

    async fn answer_in_time(
        &self,
        request: Request<Incoming>,
        call: Call<'_>,
    ) -> Result<Response<Body>, Error> {
        let deadline = metadata::deadline(request.headers());
        let limit = *deadline.as_ref().unwrap_or(&DEFAULT_DEADLINE);
        let route = async {
            match call.access.ok_or(Error::Unimplemented)? {
                Access::Health | Access::Reflection => {
                    self.answer_openly(request, call, deadline).await
                }
                Access::Public | Access::Caller => self.admit(request, call, deadline).await,
            }
        };
        tokio::time::timeout(limit, route).await.map_err(|_| Error::DeadlineExceeded)?
    }

    /// Health and reflection: only a peer that has very many of them is turned away.
    async fn answer_openly(
        &self,
        request: Request<Incoming>,
        call: Call<'_>,
        deadline: Result<Duration, Error>,
    ) -> Result<Response<Body>, Error> {
        let place = self.admission.enter_openly(&call.share)?;
        deadline?;
        let response = serve(self.open.clone(), request).await;
        let lifetime = (call.access == Some(Access::Reflection)).then_some(MAX_REFLECTION);
        let ending = call.origin.ending(lifetime);
        Ok(response.map(|body| {
            let kept = (place, call.share, call.origin.calls.token());
            OpenBody::wrap(body, call.request_id, ending, kept)
        }))
    }

    /// The one place that decides who gets through to the services of the contract.
    async fn admit(
        &self,
        request: Request<Incoming>,
        call: Call<'_>,
        deadline: Result<Duration, Error>,
    ) -> Result<Response<Body>, Error> {
        let mut room = self.admission.room(call.share.clone())?;
        // Before the call takes a place: who sends slowly holds up nobody.
        let mut request = self.admission.read(request, &mut room).await?;
        let place = self.admission.enter(&call.share).await?;
        let api = self.api.get();
        let api =
            api.ok_or_else(|| Error::DatabaseUnavailable("the service is starting".into()))?;
        if call.access == Some(Access::Caller) {
            let caller = api.authenticator.authenticate(request.headers()).await?;
            Span::current().record("user_id", field::display(caller.user_id));
            traces::note_user(caller.user_id);
            request.extensions_mut().insert(caller);
        }
        // Only now: who may not call is not told what is wrong with the call.
        deadline?;
        let response = serve(api.routes.clone(), request).await;
        drop(place);
        self.admission.answer(response, room, call.origin.sending()).await
    }
}

/// What is known of a call before it is let in.
struct Call<'a> {
    origin: &'a Arc<Origin>,
    /// The share of whoever calls.
    share: Arc<Share>,
    /// `None` if there is no such method.
    access: Option<Access>,
    request_id: &'a str,
}

async fn serve<B>(mut routes: Routes, request: Request<B>) -> Response<Body>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<error::Cause>,
{
    match routes.call(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}
