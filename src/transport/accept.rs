//! The accept loop.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::yield_now,
    time::sleep,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    ConnectionState, InboundService,
    connection::{ConnectionError, Lifetime, handshake_plaintext, handshake_tls, serve_connection},
    failures::{ConnectionFailure, FailureLog},
    tls::ReloadingTls,
};
use crate::{
    limits::client_quota::{ClientQuota, ClientQuotas},
    telemetry::metrics::{Gauge, GaugeGuard},
    types::error_chain::ErrorChain,
};

/// The pause after a failed accept: without one, a process at its limit of file descriptors would
/// occupy a core.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// File descriptors besides those of connections.
const RESERVED_FDS: u64 = 128;

/// The limits of connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionLimits {
    /// Open connections.
    pub(crate) max_connections: usize,
    /// How long a connection lasts.
    pub(crate) lifetime: Lifetime,
}

impl ConnectionLimits {
    /// Raises the limit of file descriptors to what the connections need, or as far as the hard
    /// limit allows.
    pub(crate) fn raise_fd_limit(&self) {
        let needed = self.max_connections as u64 + RESERVED_FDS;
        let allowed = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
            let allowed = needed.clamp(soft.min(hard), hard);
            setrlimit(Resource::RLIMIT_NOFILE, allowed, hard).map(|()| allowed)
        });
        if !allowed.is_ok_and(|allowed| allowed >= needed) {
            let allowed = allowed.ok();
            tracing::warn!(needed, allowed, "file descriptor limit is below MAX_CONNECTIONS");
        }
    }
}

/// Accepts connections and serves them.
#[derive(Debug)]
pub(crate) struct Acceptor<S> {
    /// Handles the calls of all connections.
    pub(crate) service: S,
    pub(crate) limits: ConnectionLimits,
    /// Without it, connections are in plaintext.
    pub(crate) tls: Option<Arc<ReloadingTls>>,
    pub(crate) quotas: Arc<ClientQuotas>,
    /// Proxies, which have no quota of their own: they connect for many clients.
    pub(crate) trusted_proxies: Vec<IpNet>,
    pub(crate) open_connections: Gauge,
    pub(crate) failures: Arc<FailureLog>,
    /// Cancelled when the server stops accepting and drains its connections.
    pub(crate) drain: CancellationToken,
    /// Cancelled when the server closes what is left.
    pub(crate) force_close: CancellationToken,
}

impl<S: InboundService> Acceptor<S> {
    /// Accepts connections until `drain`, then waits for their end.
    pub(crate) async fn run(self, listener: TcpListener) {
        let slots = Arc::new(Semaphore::new(self.limits.max_connections));
        let tasks = TaskTracker::new();
        loop {
            let (stream, peer_addr) = tokio::select! {
                accepted = self.accept(&listener) => accepted,
                () = self.drain.cancelled() => break,
            };
            self.spawn_connection(stream, peer_addr, &slots, &tasks);
            // Yield between accepts so that a burst of new connections does not starve calls in
            // flight.
            yield_now().await;
        }
        drop(listener);
        tasks.close();
        tasks.wait().await;
    }

    /// Accepts the next connection. An error of one connection does not end the loop.
    async fn accept(&self, listener: &TcpListener) -> (TcpStream, SocketAddr) {
        loop {
            match listener.accept().await.and_then(set_nodelay) {
                Ok(accepted) => return accepted,
                Err(error) => {
                    self.failures.record(ConnectionFailure::Accept, None, &error);
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    /// Serves a connection, or closes it at once if a limit is reached.
    fn spawn_connection(
        &self,
        stream: TcpStream,
        peer_addr: SocketAddr,
        slots: &Arc<Semaphore>,
        tasks: &TaskTracker,
    ) {
        let peer_ip = peer_addr.ip().to_canonical();
        let slot = match self.acquire_slot(peer_ip, slots) {
            Ok(slot) => slot,
            Err(failure) => {
                let limit = "connection limit reached, closing connection";
                return self.failures.record(failure, Some(peer_addr), &limit);
            }
        };
        let drain = self.drain.child_token();
        let connection = Arc::new(ConnectionState::new(peer_ip, slot.quota.clone(), drain));
        let (service, lifetime) = (self.service.clone(), self.limits.lifetime);
        // One task type for each kind of stream, so that a plaintext task is not as large as one
        // of TLS.
        match self.tls.clone() {
            None => {
                let handshake = handshake_plaintext(stream);
                let serving = serve_connection(handshake, connection, service, lifetime);
                tasks.spawn(self.supervise(serving, peer_addr, slot));
            }
            Some(tls) => {
                let handshake = handshake_tls(stream, tls);
                let serving = serve_connection(handshake, connection, service, lifetime);
                tasks.spawn(self.supervise(serving, peer_addr, slot));
            }
        }
    }

    fn supervise(
        &self,
        serving: impl Future<Output = Result<(), ConnectionError>> + Send + 'static,
        peer_addr: SocketAddr,
        slot: ConnectionSlot,
    ) -> impl Future<Output = Option<()>> + Send + 'static {
        let failures = self.failures.clone();
        let connection = async move {
            match serving.await {
                Ok(()) => {}
                Err(ConnectionError::Handshake(error)) => {
                    failures.record(error.failure, Some(peer_addr), &ErrorChain(&error));
                }
                Err(error) => {
                    tracing::debug!(error = %ErrorChain(&error), %peer_addr, "connection error");
                }
            }
            drop(slot);
        };
        self.force_close.clone().run_until_cancelled_owned(connection)
    }

    /// Returns an error if there are too many connections, in total or of the client.
    fn acquire_slot(
        &self,
        ip: IpAddr,
        slots: &Arc<Semaphore>,
    ) -> Result<ConnectionSlot, ConnectionFailure> {
        let quota = self.quotas.get(ip);
        let acquire = |slots: &Arc<Semaphore>| slots.clone().try_acquire_owned();
        let global_permit = acquire(slots).map_err(|_| ConnectionFailure::ConnectionLimit)?;
        let is_proxy = self.trusted_proxies.iter().any(|network| network.contains(&ip));
        let client_permit = if is_proxy {
            None
        } else {
            let permit = acquire(&quota.connections);
            Some(permit.map_err(|_| ConnectionFailure::ClientConnectionLimit)?)
        };
        Ok(ConnectionSlot {
            quota,
            _global_permit: global_permit,
            _client_permit: client_permit,
            _gauge_guard: GaugeGuard::new(&self.open_connections),
        })
    }
}

/// Responses are small, and a client waits for each.
fn set_nodelay((stream, addr): (TcpStream, SocketAddr)) -> io::Result<(TcpStream, SocketAddr)> {
    stream.set_nodelay(true).map(|()| (stream, addr))
}

/// What an open connection holds.
struct ConnectionSlot {
    quota: Arc<ClientQuota>,
    _global_permit: OwnedSemaphorePermit,
    _client_permit: Option<OwnedSemaphorePermit>,
    _gauge_guard: GaugeGuard,
}
