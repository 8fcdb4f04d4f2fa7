//! Sockets to requests: accepts connections, speaks TLS and HTTP/2, and drains at the end.
//!
//! - [`accept`]: the accept loop, and how many connections there may be
//! - [`connection`]: one connection from its handshake to its GOAWAY
//! - [`failures`]: connections that fail before their first call
//! - [`io`]: reads and writes of a connection, with a read budget and stall detection
//! - [`stall`]: detects responses and writes that a client does not read
//! - [`stream_reset`]: resets a stream that a client does not read
//! - [`tls`]: certificates, and their reload

pub(crate) mod accept;
pub(crate) mod connection;
pub(crate) mod failures;
mod io;
pub(crate) mod stall;
pub(crate) mod stream_reset;
pub(crate) mod tls;

use std::{convert::Infallible, net::IpAddr, sync::Arc};

use http::Response;
use hyper::body::Incoming;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::body::Body;
use tower::Service;

use self::stall::{StallDetector, StallGuard};
use crate::limits::client_quota::ClientQuota;

/// A request, and the connection that it came over: what the layers around calls take.
#[derive(Debug)]
pub(crate) struct Inbound {
    pub(crate) request: http::Request<Incoming>,
    pub(crate) connection: Arc<ConnectionState>,
}

/// A service that handles the requests of all connections.
pub(crate) trait InboundService:
    Service<Inbound, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
    + Clone
    + Send
    + Sync
    + 'static
{
}

impl<S> InboundService for S where
    S: Service<Inbound, Response = Response<Body>, Error = Infallible, Future: Send + 'static>
        + Clone
        + Send
        + Sync
        + 'static
{
}

/// What calls know about their connection, and the connection about its calls.
#[derive(Debug)]
pub(crate) struct ConnectionState {
    /// The address of the peer.
    pub(crate) peer_ip: IpAddr,
    /// The quota of the peer.
    pub(crate) quota: Arc<ClientQuota>,
    /// The calls in flight.
    pub(crate) calls: TaskTracker,
    /// Cancelled when the connection drains: streams end.
    pub(crate) drain: CancellationToken,
    /// Responses and writes that the client has not read yet.
    writes: Arc<StallDetector>,
}

impl ConnectionState {
    /// Creates the state of a connection whose streams end when `drain` is cancelled.
    #[must_use]
    pub(crate) fn new(peer_ip: IpAddr, quota: Arc<ClientQuota>, drain: CancellationToken) -> Self {
        let writes = StallDetector::new(stall::RESPONSE_READ_TIMEOUT);
        Self { peer_ip, quota, calls: TaskTracker::new(), drain, writes }
    }

    /// Returns `true` if no call is in flight.
    #[must_use]
    pub(crate) fn is_idle(&self) -> bool {
        self.calls.is_empty()
    }

    /// Returns `true` if at most one call is in flight.
    #[must_use]
    pub(crate) fn has_at_most_one_call(&self) -> bool {
        self.calls.len() <= 1
    }

    /// Waits until the client does not read a response in time.
    pub(crate) async fn stalled(&self) {
        self.writes.expired().await;
    }

    /// Tracks a response until it is sent, or a write until the socket takes it.
    #[must_use]
    pub(crate) fn track_write(&self) -> StallGuard {
        self.writes.track()
    }
}
