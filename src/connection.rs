//! Connections: how many there may be, how one begins, and when it ends.

use std::{
    convert::Infallible,
    future::poll_fn,
    io::{self, Cursor, IoSlice},
    net::{IpAddr, SocketAddr},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::yield_now,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    call::{Gateway, Origin, Sending},
    metrics::{Counted, Gauge},
    peers::{Peers, Share},
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

/// What is read from a connection at a time, in bytes, before others have their turn: as
/// much as the largest frame. What comes in a flood of small frames would keep a thread
/// busy for milliseconds.
const READ_AT_A_TIME: usize = 16 * 1024;

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
        peers: Arc<Peers>,
        limits: Limits,
        tls: Option<Arc<Tls>>,
        count: Gauge,
        closing: CancellationToken,
        cutting: CancellationToken,
    ) -> Self {
        let places = Arc::new(Semaphore::new(limits.total));
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
            // Hundreds may come at once: calls have their turn in between.
            yield_now().await;
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
            let origin = Arc::new(Origin::new(ip, place.share.clone(), ending.clone()));
            let serving = pin!(serve(beginning, origin.clone(), gateway, limits, ending));
            if let Err(error) = after_others(&origin, serving).await {
                tracing::debug!(cause = %error, %peer, "a connection broke");
            }
            drop(place);
        };
        self.open.spawn(self.cutting.clone().run_until_cancelled_owned(connection));
    }

    /// A place among all, and among those of the peer; proxies speak for many peers.
    fn place(&self, ip: IpAddr) -> Option<Place> {
        let share = self.peers.share(ip);
        let of_all = self.places.clone().try_acquire_owned().ok()?;
        let of_peer = if self.gateway.trusts(ip) {
            None
        } else {
            Some(share.connections.clone().try_acquire_owned().ok()?)
        };
        let counted = Counted::by(&self.count);
        Some(Place { share, _of_all: of_all, _of_peer: of_peer, _counted: counted })
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
    /// The share of the peer.
    share: Arc<Share>,
    _of_all: OwnedSemaphorePermit,
    _of_peer: Option<OwnedSemaphorePermit>,
    _counted: Counted,
}

async fn serve(
    beginning: impl Future<Output = io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static>>,
    origin: Arc<Origin>,
    gateway: Arc<Gateway>,
    limits: Limits,
    ending: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let stream = timeout(HANDSHAKE_TIMEOUT, beginning).await??;
    let stream = Wire::new(stream, origin.clone());
    let begun = Arc::new(AtomicUsize::new(0));
    let service = {
        let (origin, begun) = (origin.clone(), begun.clone());
        service_fn(move |request: http::Request<Incoming>| {
            begun.fetch_add(1, Ordering::Relaxed);
            let answering = gateway.answer(request, &origin);
            async { Ok::<_, Infallible>(answering.await) }
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
        () = origin.is_stuck() => tracing::debug!("an answer was not read in time"),
        () = ending.cancelled() => {}
        () = sleep(about(limits.max_age)) => {}
        () = idle(&origin, &begun, limits.idle) => {}
    }
    // Streams end with the token; nothing else has an end that it does not know.
    ending.cancel();
    connection.as_mut().graceful_shutdown();
    Ok(timeout(GOODBYE_TIMEOUT, connection).await??)
}

/// Gives the tasks that can go on their turn each time before this one: the answers of calls
/// that end together are then written together, and not each by itself. One call alone has
/// nobody to wait for, and each turn that is given away may wake a thread that sleeps.
async fn after_others<T>(origin: &Origin, mut task: Pin<&mut impl Future<Output = T>>) -> T {
    let mut is_last = true;
    poll_fn(|context| {
        is_last = !is_last || origin.has_one_call();
        if is_last {
            return task.as_mut().poll(context);
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await
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

/// What a connection is read from and written to. It does not read for long at a time, and
/// sees to it that somebody notices when the other side does not read at all.
struct Wire<S> {
    stream: S,
    /// How many bytes may be read in this turn.
    left: usize,
    origin: Arc<Origin>,
    /// While what is to be written has to wait.
    unsent: Option<Sending>,
}

impl<S> Wire<S> {
    fn new(stream: S, origin: Arc<Origin>) -> Self {
        Self { stream, left: READ_AT_A_TIME, origin, unsent: None }
    }

    fn watch<T>(&mut self, written: Poll<T>) -> Poll<T> {
        self.unsent = match written {
            Poll::Ready(_) => None,
            Poll::Pending => self.unsent.take().or_else(|| Some(self.origin.sending())),
        };
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left == 0 {
            self.left = READ_AT_A_TIME;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let count = buffer.filled().len() - before;
        // Who waits for more gives others their turn.
        self.left =
            if read.is_pending() { READ_AT_A_TIME } else { self.left.saturating_sub(count) };
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.watch(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.watch(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
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
    fn ages_differ_by_a_tenth_at_the_most() {
        for _ in 0..100 {
            let age = about(Duration::from_secs(100)).as_secs_f64();
            assert!((90.0..=110.0).contains(&age), "{age}");
        }
    }
}
