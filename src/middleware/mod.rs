//! The lifecycle of a request: what happens around every method, top to bottom.
//!
//! ```text
//! transport: socket, TLS, HTTP/2
//!     │  Inbound: a request, and the state of its connection
//!     ▼
//! request id ────── propagates or generates x-request-id, reads the metadata once
//! telemetry ─────── span, one log line and metrics when the response ends, streams included
//! error details ─── completes google.rpc details, logs the sources of errors
//! policy ────────── UNIMPLEMENTED, UNAUTHENTICATED without credentials: before any cost
//! deadline ──────── unary: the shorter of grpc-timeout and the default; DEADLINE_EXCEEDED
//! load shedding ─── memory, quotas, a permit, the whole request; RESOURCE_EXHAUSTED
//! authentication ── the caller from the metadata; UNAUTHENTICATED
//! decompression ─── the message, within the limits; OUT_OF_RANGE, RESOURCE_EXHAUSTED
//! stream ────────── ends a stream: deadline, token, session, connection age, shutdown, a client
//!                   that does not read it
//!     │
//!     ▼
//! routes: health and reflection from the start, the API once the database is ready
//! ```
//!
//! The order is one `tower::ServiceBuilder`, in [`stack`]. Each layer is a file. The layers down
//! to deadline run before the future is polled, so that a call that is rejected there
//! allocates no future. A response of the API is buffered ([`buffer`]) unless it is a stream, and
//! compressed there ([`compression`]).

mod authentication;
mod buffer;
mod call;
mod compression;
mod deadline;
mod decompression;
mod error_details;
mod load_shedding;
mod policy;
mod request_id;
mod routes;
mod single_message;
mod stream;
mod stream_progress;
mod streaming_body;
mod telemetry;

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
};

use http::Response;
use ipnet::IpNet;
use tokio_util::task::TaskTracker;
use tonic::{body::Body, service::Routes};
use tower::ServiceBuilder;

use crate::{
    limits::{admission::Admission, client_quota::ClientQuotas},
    rpc::{error::Error, policy::MethodTable},
    telemetry::{metrics::Metrics, traces::CallTracer},
    transport::InboundService,
};

pub(crate) use self::routes::ApiRoutes;

/// The boxed future of a layer that is written as an async block.
type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response<Body>, Error>> + Send>>;

/// What the layers share. A call carries it, so that a layer holds nothing, and the copy of the
/// layers that each call makes is cheap.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) methods: MethodTable,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tracer: CallTracer,
    pub(crate) admission: Admission,
    pub(crate) quotas: Arc<ClientQuotas>,
    /// Networks of proxies whose `x-forwarded-for` is trusted.
    pub(crate) trusted_proxies: Vec<IpNet>,
    /// The calls in flight, streams included.
    pub(crate) calls: TaskTracker,
    /// Health and reflection.
    pub(crate) system: Routes,
    /// The API: set once the database is ready.
    pub(crate) api: OnceLock<ApiRoutes>,
}

impl Context {
    /// Waits until no call is in flight.
    pub(crate) async fn drain(&self) {
        self.calls.close();
        self.calls.wait().await;
    }
}

/// Returns the layers, from the outermost to the routes.
pub(crate) fn stack(context: &Arc<Context>) -> impl InboundService {
    ServiceBuilder::new()
        .layer_fn(|inner| request_id::RequestId::new(inner, context.clone()))
        .layer_fn(telemetry::Telemetry::new)
        .layer_fn(error_details::ErrorDetails::new)
        .layer_fn(policy::Policy::new)
        .layer_fn(deadline::Deadline::new)
        .layer_fn(load_shedding::LoadShedding::new)
        .layer_fn(authentication::Authentication::new)
        .layer_fn(decompression::Decompression::new)
        .layer_fn(stream::Stream::new)
        .service(routes::ServiceRoutes)
}
