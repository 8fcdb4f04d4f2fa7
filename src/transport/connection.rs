//! One HTTP/2 connection: handshake, limits, and the reasons for which it drains.

use std::{
    future::poll_fn,
    io::{self, Cursor},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{ConnectionState, Inbound, InboundService, io::ConnectionIo, tls::ReloadingTls};
use crate::types::error_chain::BoxError;

/// `SETTINGS_MAX_HEADER_LIST_SIZE`: the largest metadata of a request.
///
/// Test: `metadata_above_16_kib_is_rejected_and_the_connection_stays_open`.
const MAX_HEADER_LIST_BYTES: u32 = 16 * 1024;

/// `SETTINGS_MAX_CONCURRENT_STREAMS`: half of the default of `MAX_CONCURRENT_CALLS`, so that one
/// connection does not take all call permits.
const MAX_CONCURRENT_STREAMS: u32 = 128;

/// The flow-control window of a stream: enough for requests, which are small.
const INITIAL_STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// The flow-control window of a connection. h2 treats it as an attack if the overhead of small
/// frames that are not read yet, about 250 bytes each, exceeds half of this: as many calls as may
/// start at once must stay far below.
const INITIAL_CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

/// How long a connection may take until it speaks HTTP/2, TLS included.
///
/// Test: `connections_without_a_valid_preface_are_closed`.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// The client's connection preface (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The interval of PING frames on a connection without frames, and how long their acknowledgment
/// may take.
const KEEPALIVE_INTERVAL: Duration = Duration::from_mins(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection may take to drain after GOAWAY: longer than any unary call.
const CONNECTION_DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection lasts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lifetime {
    /// The age at which it drains, with a jitter of a tenth, so that connections that were opened
    /// together do not drain together.
    pub(crate) max_age: Duration,
    /// A connection without a call drains after this time, and after twice this time at the
    /// latest.
    pub(crate) idle_timeout: Duration,
}

/// Serves a connection until it has ended.
pub(super) async fn serve_connection(
    handshake: impl Future<Output = io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static>>,
    connection: Arc<ConnectionState>,
    service: impl InboundService,
    lifetime: Lifetime,
) -> Result<(), BoxError> {
    let state = connection.clone();
    let serving = pin!(serve_http2(handshake, connection, service, lifetime));
    yield_before_poll(&state, serving).await
}

async fn serve_http2(
    handshake: impl Future<Output = io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static>>,
    connection: Arc<ConnectionState>,
    service: impl InboundService,
    lifetime: Lifetime,
) -> Result<(), BoxError> {
    let stream = timeout(HANDSHAKE_TIMEOUT, handshake).await??;
    let stream = ConnectionIo::new(stream, connection.clone());
    let started_calls = Arc::new(AtomicUsize::new(0));
    let call = {
        let (connection, started_calls) = (connection.clone(), started_calls.clone());
        service_fn(move |request: http::Request<Incoming>| {
            started_calls.fetch_add(1, Ordering::Relaxed);
            service.clone().call(Inbound { request, connection: connection.clone() })
        })
    };
    let http2 = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEADER_LIST_BYTES)
        .max_concurrent_streams(MAX_CONCURRENT_STREAMS)
        .initial_connection_window_size(INITIAL_CONNECTION_WINDOW_BYTES)
        .initial_stream_window_size(INITIAL_STREAM_WINDOW_BYTES)
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .serve_connection(TokioIo::new(stream), call);
    let mut http2 = pin!(http2);
    tokio::select! {
        ended = http2.as_mut() => return Ok(ended?),
        () = connection.stalled() => tracing::debug!("client stopped reading, closing connection"),
        () = connection.drain.cancelled() => {}
        () = sleep(with_jitter(lifetime.max_age)) => {}
        () = wait_until_idle(&connection, &started_calls, lifetime.idle_timeout) => {}
    }
    // Ends the streams. Unary calls end by themselves.
    connection.drain.cancel();
    http2.as_mut().graceful_shutdown();
    Ok(timeout(CONNECTION_DRAIN_TIMEOUT, http2).await??)
}

/// Lets the runnable tasks go first each time before the connection's, so that the responses of
/// calls that end together are written together. A connection with one call does not yield: a
/// yield may wake another thread, and gains nothing.
async fn yield_before_poll<T>(
    connection: &ConnectionState,
    mut serving: Pin<&mut impl Future<Output = T>>,
) -> T {
    let mut has_yielded = true;
    poll_fn(|context| {
        has_yielded = !has_yielded || connection.has_at_most_one_call();
        if has_yielded {
            return serving.as_mut().poll(context);
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

/// Waits until the client speaks HTTP/2. The halves of a TCP stream need no lock between them,
/// as those of TLS do.
pub(super) async fn handshake_plaintext(
    stream: TcpStream,
) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin> {
    let (read, write) = stream.into_split();
    read_preface(read, write).await
}

/// Waits until the client speaks HTTP/2 over TLS.
pub(super) async fn handshake_tls(
    stream: TcpStream,
    tls: Arc<ReloadingTls>,
) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin> {
    let (read, write) = tokio::io::split(tls.accept(stream).await?);
    read_preface(read, write).await
}

/// Reads the preface here: hyper would wait for it without a limit.
async fn read_preface(
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

/// Waits until no call was in flight for `idle_timeout`.
async fn wait_until_idle(
    connection: &ConnectionState,
    started_calls: &AtomicUsize,
    idle_timeout: Duration,
) {
    let mut before = usize::MAX;
    loop {
        let now = started_calls.load(Ordering::Relaxed);
        if now == before && connection.is_idle() {
            return;
        }
        before = now;
        sleep(idle_timeout).await;
    }
}

/// Returns a duration that differs by up to a tenth.
fn with_jitter(duration: Duration) -> Duration {
    // The last bits of a UUIDv7 are random.
    let (_, random) = uuid::Uuid::now_v7().as_u64_pair();
    let random = u16::try_from(random & 0xffff).unwrap_or_default();
    duration.mul_f64(0.9 + 0.2 * f64::from(random) / 65_535.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jitter_is_at_most_a_tenth() {
        for _ in 0..100 {
            let age = with_jitter(Duration::from_secs(100)).as_secs_f64();
            assert!((90.0..=110.0).contains(&age), "{age}");
        }
    }
}
