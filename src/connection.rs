//! Connections: how many there may be, how one begins, and when it ends.

use std::{
    collections::HashMap,
    convert::Infallible,
    io::{self, Cursor},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    call::{Gateway, Origin},
    metrics::{Counted, Gauge},
    tls::Tls,
};

/// The largest metadata of a request, in bytes.
const MAX_HEADER_BYTES: u32 = 16 * 1024;

/// Calls under way at once on one connection: half of MAX_CONCURRENT_CALLS as it is by
/// default, so that one connection does not take all places.
const MAX_STREAMS: u32 = 128;

/// What a caller may send of one call before the service has read it, in bytes: enough for
/// requests, which are small.
const STREAM_WINDOW: u32 = 64 * 1024;

/// The same for all calls of a connection. h2 takes it for an attack when the overhead of
/// small frames that are not read yet passes half of this, some 250 bytes each: as many
/// calls as may begin at once must be far from it.
const CONNECTION_WINDOW: u32 = 1024 * 1024;

/// How long a connection may take until it speaks HTTP/2, TLS included.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// What a client says first (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection on which nothing moves is asked after this time whether it is still
/// there, and closed when it does not answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_mins(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection that was told to end may take: longer than any call.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause after a connection could not be accepted: when the process has too many
/// files open, trying again at once would take a whole core.
const ACCEPT_RETRY_AFTER: Duration = Duration::from_millis(50);

/// Files that the process has open besides its connections, and then some.
const OTHER_FILES: u64 = 128;

/// What connections may be and do.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Open at once, in all.
    pub total: usize,
    /// Open at once from one address.
    pub per_peer: usize,
    /// The age at which one is told to end, give or take a tenth, so that those which were
    /// opened together do not end together.
    pub max_age: Duration,
    /// One without a call for this long is told to end, after twice this time at the
    /// latest.
    pub idle: Duration,
}

impl Limits {
    /// Lets the process open as many files as these connections need, or as many as it may:
    /// the usual limit of 1024 is one for programs that know no better.
    pub fn allow_files(&self) {
        let needed = self.total as u64 + OTHER_FILES;
        let allowed = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
            let allowed = needed.clamp(soft.min(hard), hard);
            setrlimit(Resource::RLIMIT_NOFILE, allowed, hard).map(|()| allowed)
        });
        if !allowed.is_ok_and(|allowed| allowed >= needed) {
            tracing::warn!(
                needed,
                "fewer files may be open than MAX_CONNECTIONS needs: the last ones wait"
            );
        }
    }
}

/// Accepts connections.
#[derive(Debug)]
pub struct Acceptor {
    gateway: Arc<Gateway>,
    limits: Limits,
    /// Without it, connections are in the clear.
    tls: Option<Arc<Tls>>,
    places: Arc<Semaphore>,
    peers: Arc<Peers>,
    open: TaskTracker,
    /// How many are open.
    count: Gauge,
    /// Cancelled when no more connections are accepted.
    closing: CancellationToken,
    /// Cancelled when what is left of them is cut.
    cutting: CancellationToken,
}

impl Acceptor {
    /// Accepts nothing yet.
    pub fn new(
        gateway: Arc<Gateway>,
        limits: Limits,
        tls: Option<Arc<Tls>>,
        count: Gauge,
        closing: CancellationToken,
        cutting: CancellationToken,
    ) -> Self {
        let places = Arc::new(Semaphore::new(limits.total));
        let peers = Arc::new(Peers { limit: limits.per_peer, open: Mutex::default() });
        let open = TaskTracker::new();
        Self { gateway, limits, tls, places, peers, open, count, closing, cutting }
    }

    /// Accepts connections until `closing`, then waits for their end.
    pub async fn run(self, listener: TcpListener) {
        loop {
            let (stream, peer) = tokio::select! {
                accepted = accept(&listener) => accepted,
                () = self.closing.cancelled() => break,
            };
            self.take(stream, peer);
        }
        drop(listener);
        self.open.close();
        self.open.wait().await;
    }

    /// Serves a connection, or closes it at once if there are too many.
    fn take(&self, stream: TcpStream, peer: SocketAddr) {
        let ip = peer.ip().to_canonical();
        let Some(place) = self.place(ip) else {
            tracing::debug!(%peer, "a connection too many");
            return;
        };
        match self.tls.clone() {
            None => self.spawn(begin(stream), peer, place),
            Some(tls) => self.spawn(begin_with_tls(stream, tls), peer, place),
        }
    }

    /// Serves what begins so. A task of one kind takes no room for the other.
    fn spawn<S>(
        &self,
        beginning: impl Future<Output = io::Result<S>> + Send + 'static,
        peer: SocketAddr,
        place: Place,
    ) where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (gateway, limits) = (self.gateway.clone(), self.limits);
        let ending = self.closing.child_token();
        let connection = async move {
            let ip = peer.ip().to_canonical();
            if let Err(error) = serve(beginning, ip, gateway, limits, ending).await {
                tracing::debug!(cause = %error, %peer, "a connection broke");
            }
            drop(place);
        };
        self.open.spawn(self.cutting.clone().run_until_cancelled_owned(connection));
    }

    /// A place among all, and among those of the peer; proxies speak for many peers.
    fn place(&self, ip: IpAddr) -> Option<Place> {
        let one_of_all = self.places.clone().try_acquire_owned().ok()?;
        let one_of_peer =
            if self.gateway.trusts(ip) { None } else { Some(Peers::enter(&self.peers, ip)?) };
        let counted = Counted::by(&self.count);
        Some(Place { _one_of_all: one_of_all, _one_of_peer: one_of_peer, _counted: counted })
    }
}

/// Waits for the next connection; what goes wrong with one does not end the waiting.
pub async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await.and_then(without_delay) {
            Ok(accepted) => return accepted,
            Err(error) => {
                tracing::warn!(cause = %error, "a connection could not be accepted");
                sleep(ACCEPT_RETRY_AFTER).await;
            }
        }
    }
}

/// Answers are small, and somebody waits for them.
fn without_delay((stream, peer): (TcpStream, SocketAddr)) -> io::Result<(TcpStream, SocketAddr)> {
    stream.set_nodelay(true).map(|()| (stream, peer))
}

/// What an open connection takes up.
struct Place {
    _one_of_all: OwnedSemaphorePermit,
    _one_of_peer: Option<PeerPlace>,
    _counted: Counted,
}

/// How many connections each address has open.
#[derive(Debug)]
struct Peers {
    limit: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

struct PeerPlace {
    peers: Arc<Peers>,
    peer: IpAddr,
}

impl Peers {
    fn enter(this: &Arc<Self>, ip: IpAddr) -> Option<PeerPlace> {
        let peer = network(ip);
        let mut open = this.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(peer).or_default();
        // An entry without connections is never there: none may be zero.
        if *count >= this.limit {
            return None;
        }
        *count += 1;
        Some(PeerPlace { peers: this.clone(), peer })
    }
}

impl Drop for PeerPlace {
    fn drop(&mut self) {
        let mut open = self.peers.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.peer);
            }
        }
    }
}

/// Whom an address stands for: whoever has one IPv6 address has the /64 around it.
#[must_use]
pub fn network(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => ip.into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64)).into(),
    }
}

async fn serve(
    beginning: impl Future<Output = io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static>>,
    ip: IpAddr,
    gateway: Arc<Gateway>,
    limits: Limits,
    ending: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let stream = timeout(HANDSHAKE_TIMEOUT, beginning).await??;
    let origin = Arc::new(Origin::new(ip, ending.clone()));
    let begun = Arc::new(AtomicUsize::new(0));
    let service = {
        let (origin, begun) = (origin.clone(), begun.clone());
        service_fn(move |request: http::Request<Incoming>| {
            let (gateway, origin) = (gateway.clone(), origin.clone());
            begun.fetch_add(1, Ordering::Relaxed);
            async move { Ok::<_, Infallible>(gateway.answer(request, &origin).await) }
        })
    };
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return Ok(ended?),
        () = origin.is_stuck() => return Err("an answer was not read in time".into()),
        () = ending.cancelled() => {}
        () = sleep(about(limits.max_age)) => {}
        () = idle(&origin, &begun, limits.idle) => {}
    }
    // Streams end with the token; nothing else has an end that it does not know.
    ending.cancel();
    connection.as_mut().graceful_shutdown();
    tokio::select! {
        ended = timeout(GOODBYE_TIMEOUT, connection) => Ok(ended??),
        () = origin.is_stuck() => Err("an answer was not read in time".into()),
    }
}

/// Waits until the client speaks HTTP/2. The halves of a plain stream need no lock between
/// them, as those of TLS do.
async fn begin(stream: TcpStream) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin> {
    let (read, write) = stream.into_split();
    speak(read, write).await
}

/// Waits until the client speaks HTTP/2 over TLS.
async fn begin_with_tls(
    stream: TcpStream,
    tls: Arc<Tls>,
) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin> {
    let (read, write) = tokio::io::split(tls.accept(stream).await?);
    speak(read, write).await
}

/// Reads the preface: hyper itself would wait for it for ever.
async fn speak(
    mut read: impl AsyncRead + Send + Unpin,
    write: impl AsyncWrite + Send + Unpin,
) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin> {
    let mut preface = [0; PREFACE.len()];
    read.read_exact(&mut preface).await?;
    if preface != *PREFACE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the client speaks no HTTP/2"));
    }
    Ok(tokio::io::join(Cursor::new(preface).chain(read), write))
}

/// Waits until no call was under way for `limit`.
async fn idle(origin: &Origin, begun: &AtomicUsize, limit: Duration) {
    let mut before = usize::MAX;
    loop {
        let now = begun.load(Ordering::Relaxed);
        if now == before && origin.is_quiet() {
            return;
        }
        before = now;
        sleep(limit).await;
    }
}

/// A tenth more or less, by chance.
fn about(age: Duration) -> Duration {
    // The last bits of an id of version 7 are random.
    let (_, random) = uuid::Uuid::now_v7().as_u64_pair();
    age.mul_f64(
        0.9 + 0.2 * f64::from(u16::try_from(random & 0xffff).unwrap_or_default()) / 65_535.0,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_has_as_many_places_as_the_limit() {
        let peers = Arc::new(Peers { limit: 2, open: Mutex::default() });
        let ip = |text: &str| text.parse().expect("an address");
        let one = Peers::enter(&peers, ip("2001:db8::1")).expect("a place");
        let _other = Peers::enter(&peers, ip("2001:db8::2")).expect("a place");
        assert!(Peers::enter(&peers, ip("2001:db8::ffff:0:0:3")).is_none(), "the same network");
        assert!(Peers::enter(&peers, ip("2001:db8:0:1::1")).is_some(), "another one");
        assert!(Peers::enter(&peers, ip("192.0.2.1")).is_some());
        drop(one);
        assert!(Peers::enter(&peers, ip("2001:db8::1")).is_some());
        assert_eq!(peers.open.lock().expect("no panic").len(), 1, "nothing is kept for nobody");
    }

    #[test]
    fn ages_differ_by_a_tenth_at_the_most() {
        for _ in 0..100 {
            let age = about(Duration::from_secs(100)).as_secs_f64();
            assert!((90.0..=110.0).contains(&age), "{age}");
        }
    }
}
