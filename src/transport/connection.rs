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
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::TcpStream,
    time::{sleep, timeout},
};

use super::{
    ConnectionState, Inbound, InboundService,
    failures::{ConnectionFailure, HandshakeError},
    io::ConnectionIo,
    stream_reset::StreamExecutor,
    tls::ReloadingTls,
};
use crate::types::{error_chain::BoxError, jitter::with_jitter};

/// `SETTINGS_MAX_HEADER_LIST_SIZE`: the largest metadata of a request.
///
/// Test: `metadata_above_16_kib_is_rejected_and_the_connection_stays_open`.
const MAX_HEADER_LIST_BYTES: u32 = 16 * 1024;

/// `SETTINGS_MAX_CONCURRENT_STREAMS`: half of the default of `MAX_CONCURRENT_CALLS`, so that one
/// connection does not take all call permits.
///
/// Test: `a_connection_has_so_many_calls_in_flight_and_no_more`.
const MAX_CONCURRENT_STREAMS: u32 = 128;

/// The flow-control window of a stream: enough for requests, which are small.
///
/// Test: `the_settings_of_http2_bound_what_a_client_sends`.
const INITIAL_STREAM_WINDOW_BYTES: u32 = 64 * 1024;

/// The flow-control window of a connection. h2 treats it as an attack if the overhead of small
/// frames that are not read yet, about 250 bytes each, exceeds half of this: as many calls as may
/// start at once must stay far below.
///
/// Test: `the_settings_of_http2_bound_what_a_client_sends`.
const INITIAL_CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;

/// How long a connection may take until it speaks HTTP/2, TLS included.
///
/// Test: `connections_without_a_valid_preface_are_closed`.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// The client's connection preface (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The start of a TLS connection: the type of a handshake record, and the major version.
const TLS_HANDSHAKE: &[u8] = &[0x16, 0x03];

/// How long a connection may be without frames until the server sends a PING.
///
/// Test: `a_client_that_does_not_acknowledge_a_ping_is_closed`.
const KEEPALIVE_INTERVAL: Duration = Duration::from_mins(1);

/// How long the acknowledgment of a PING may take. Then the connection closes: the client is
/// gone, and its network does not report it.
///
/// Test: `a_client_that_does_not_acknowledge_a_ping_is_closed`.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a connection may take to drain after GOAWAY: longer than any unary call.
///
/// Test: `a_client_that_does_not_read_errors_is_disconnected`.
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

/// The stream of a client that speaks HTTP/2.
type Handshake<S> = Result<S, HandshakeError>;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Http2(BoxError),
}

/// Serves a connection until it has ended.
pub(super) async fn serve_connection<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    handshake: impl Future<Output = Handshake<S>>,
    connection: Arc<ConnectionState>,
    service: impl InboundService,
    lifetime: Lifetime,
) -> Result<(), ConnectionError> {
    let state = connection.clone();
    let serving = pin!(serve_http2(handshake, connection, service, lifetime));
    yield_before_poll(&state, serving).await
}

async fn serve_http2<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    handshake: impl Future<Output = Handshake<S>>,
    connection: Arc<ConnectionState>,
    service: impl InboundService,
    lifetime: Lifetime,
) -> Result<(), ConnectionError> {
    let stream = timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|error| HandshakeError::new(ConnectionFailure::Timeout, error.into()))??;
    let stream = ConnectionIo::new(stream, connection.clone());
    let started_calls = Arc::new(AtomicUsize::new(0));
    let call = {
        let (connection, started_calls) = (connection.clone(), started_calls.clone());
        service_fn(move |request: http::Request<Incoming>| {
            started_calls.fetch_add(1, Ordering::Relaxed);
            service.clone().call(Inbound { request, connection: connection.clone() })
        })
    };
    let http2 = http2::Builder::new(StreamExecutor)
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
        ended = http2.as_mut() => {
            return ended.map_err(|error| ConnectionError::Http2(error.into()));
        }
        () = connection.stalled() => tracing::debug!("client stopped reading, closing connection"),
        () = connection.drain.cancelled() => {}
        () = sleep(with_jitter(lifetime.max_age)) => {}
        () = wait_until_idle(&connection, &started_calls, lifetime.idle_timeout) => {}
    }
    // Ends the streams. Unary calls end by themselves.
    connection.drain.cancel();
    http2.as_mut().graceful_shutdown();
    match timeout(CONNECTION_DRAIN_TIMEOUT, http2).await {
        Ok(ended) => ended.map_err(|error| ConnectionError::Http2(error.into())),
        Err(elapsed) => Err(ConnectionError::Http2(elapsed.into())),
    }
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
) -> Handshake<impl AsyncRead + AsyncWrite + Send + Unpin> {
    let (read, write) = stream.into_split();
    read_preface(read, write).await
}

/// Waits until the client speaks HTTP/2 over TLS.
pub(super) async fn handshake_tls(
    stream: TcpStream,
    tls: Arc<ReloadingTls>,
) -> Handshake<impl AsyncRead + AsyncWrite + Send + Unpin> {
    let (read, write) = tokio::io::split(tls.accept(stream).await?);
    read_preface(read, write).await
}

/// Reads the preface here: hyper would wait for it without a limit.
async fn read_preface(
    mut read: impl AsyncRead + Send + Unpin,
    write: impl AsyncWrite + Send + Unpin,
) -> Handshake<impl AsyncRead + AsyncWrite + Send + Unpin> {
    let mut preface = [0; PREFACE.len()];
    read.read_exact(&mut preface).await.map_err(HandshakeError::disconnected)?;
    if preface != *PREFACE {
        let (failure, message) = if preface.starts_with(TLS_HANDSHAKE) {
            (ConnectionFailure::TlsToPlaintext, "the client speaks TLS")
        } else {
            (ConnectionFailure::NotHttp2, "the client speaks no HTTP/2")
        };
        let error = io::Error::new(io::ErrorKind::InvalidData, message);
        return Err(HandshakeError::new(failure, error));
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

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::ready, net::Ipv4Addr};

    use http::Response;
    use tokio::{io::AsyncWriteExt, time::Instant};
    use tokio_util::sync::CancellationToken;
    use tonic::body::Body;

    use super::*;
    use crate::limits::client_quota::{ClientLimits, ClientQuotas};

    /// Frame types (RFC 9113, section 6).
    const SETTINGS: u8 = 0x4;
    const PING: u8 = 0x6;

    /// The flag of an acknowledgment.
    const ACK: u8 = 0x1;

    /// Encodes a frame of the connection itself.
    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let len = u8::try_from(payload.len()).expect("a short payload");
        [&[0, 0, len, kind, flags, 0, 0, 0, 0], payload].concat()
    }

    /// Reads up to the next PING, and returns its payload, or `None` if the connection closes.
    async fn next_ping(client: &mut (impl AsyncRead + Unpin)) -> Option<Vec<u8>> {
        loop {
            let mut head = [0; 9];
            client.read_exact(&mut head).await.ok()?;
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            client.read_exact(&mut payload).await.ok()?;
            if head[3] == PING {
                return Some(payload);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_acknowledge_a_ping_is_closed() {
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        let ip = Ipv4Addr::LOCALHOST.into();
        let quota = ClientQuotas::new(ClientLimits::default()).get(ip);
        let connection = ConnectionState::new(ip, quota, CancellationToken::new());
        let service =
            tower::service_fn(|_| async { Ok::<_, Infallible>(Response::new(Body::empty())) });
        let day = Duration::from_hours(24);
        let lifetime = Lifetime { max_age: day, idle_timeout: day };
        let server = ready(Ok(server));
        tokio::spawn(async move {
            let _ = serve_connection(server, Arc::new(connection), service, lifetime).await;
        });
        let started = Instant::now();
        let seconds = || started.elapsed().as_secs_f64().round();
        let start = [&PREFACE[..], &frame(SETTINGS, 0, &[])].concat();
        client.write_all(&start).await.expect("sent");

        let ping = next_ping(&mut client).await.expect("a PING");
        assert!((seconds() - 60.0).abs() < 1.0, "{}", seconds());
        client.write_all(&frame(PING, ACK, &ping)).await.expect("sent");
        next_ping(&mut client).await.expect("another PING, because the client is there");
        assert!((seconds() - 120.0).abs() < 1.0, "{}", seconds());
        assert_eq!(next_ping(&mut client).await, None, "the connection closes");
        assert!((seconds() - 140.0).abs() < 1.0, "{}", seconds());
    }

    #[test]
    fn an_error_of_http2_is_no_source_of_itself() {
        let error = ConnectionError::Http2("reset".into());
        assert_eq!(error.to_string(), "reset");
        assert!(std::error::Error::source(&error).is_none());
    }
}
