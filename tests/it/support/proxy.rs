//! A TCP proxy for PostgreSQL that a test can open, pause and close.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
    time::sleep,
};
use tokio_util::sync::CancellationToken;

/// A proxy that forwards connections to PostgreSQL until it is dropped.
pub struct Proxy {
    closed: CancellationToken,
    /// The number of connections that are paused: the first ones.
    paused: watch::Sender<usize>,
    /// The number of connections that were accepted.
    accepted: Arc<AtomicUsize>,
}

impl Proxy {
    /// Returns an address at which nothing listens until a proxy is opened there.
    pub async fn reserve_address() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        listener.local_addr().expect("a bound port")
    }

    /// Forwards from this address.
    pub async fn open(address: SocketAddr, upstream: &PgConnectOptions) -> Self {
        Self::open_with_latency(address, upstream, Duration::ZERO).await
    }

    /// Forwards from this address, and delays all bytes in both directions.
    pub async fn open_with_latency(
        address: SocketAddr,
        upstream: &PgConnectOptions,
        latency: Duration,
    ) -> Self {
        let listener = TcpListener::bind(address).await.expect("the port is still free");
        let closed = CancellationToken::new();
        let upstream = Upstream::from_options(upstream);
        let (paused, paused_receiver) = watch::channel(0);
        let accepted = Arc::default();
        let forwarder = Forwarder {
            upstream,
            paused: paused_receiver,
            accepted: Arc::clone(&accepted),
            closed: closed.clone(),
            latency,
        };
        tokio::spawn(closed.clone().run_until_cancelled_owned(forwarder.run(listener)));
        Self { closed, paused, accepted }
    }

    /// Holds all bytes back. Connections stay open and new ones are accepted, but nothing is
    /// forwarded, as with a server that is stopped by SIGSTOP.
    pub fn pause(&self) {
        self.paused.send_replace(usize::MAX);
    }

    /// Returns the number of connections that were accepted so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Holds back the bytes of the open connections only, as a firewall does that has forgotten
    /// them.
    pub fn pause_open_connections(&self) {
        self.paused.send_replace(self.accepted());
    }

    /// Forwards the bytes that were held back, and all later ones.
    pub fn resume(&self) {
        self.paused.send_replace(0);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

#[derive(Clone)]
enum Upstream {
    Socket(PathBuf),
    Tcp(String, u16),
}

impl Upstream {
    fn from_options(options: &PgConnectOptions) -> Self {
        match options.get_socket() {
            Some(dir) => Self::Socket(dir.join(format!(".s.PGSQL.{}", options.get_port()))),
            None => Self::Tcp(options.get_host().to_owned(), options.get_port()),
        }
    }
}

struct Forwarder {
    upstream: Upstream,
    paused: watch::Receiver<usize>,
    accepted: Arc<AtomicUsize>,
    closed: CancellationToken,
    latency: Duration,
}

impl Forwarder {
    async fn run(self, listener: TcpListener) {
        while let Ok((client, _)) = listener.accept().await {
            let index = self.accepted.fetch_add(1, Ordering::SeqCst);
            let latency = self.latency;
            let (upstream, paused) = (self.upstream.clone(), self.paused.clone());
            tokio::spawn(self.closed.clone().run_until_cancelled_owned(async move {
                let link = Link { index, paused, latency };
                match upstream {
                    Upstream::Socket(path) => {
                        copy_both_ways(client, UnixStream::connect(path).await, link).await;
                    }
                    Upstream::Tcp(host, port) => {
                        let server = TcpStream::connect((host, port)).await;
                        copy_both_ways(client, server, link).await;
                    }
                }
            }));
        }
    }
}

/// When the bytes of a connection are forwarded.
#[derive(Clone)]
struct Link {
    index: usize,
    paused: watch::Receiver<usize>,
    latency: Duration,
}

impl Link {
    /// Waits for the latency, and until the connection is not paused. Returns `false` if the proxy was dropped.
    async fn passes(&mut self) -> bool {
        if !self.latency.is_zero() {
            sleep(self.latency).await;
        }
        self.paused.wait_for(|paused| self.index >= *paused).await.is_ok()
    }
}

async fn copy_both_ways<S: AsyncRead + AsyncWrite>(
    client: TcpStream,
    server: io::Result<S>,
    link: Link,
) {
    let Ok(server) = server else {
        return;
    };
    let (from_client, to_client) = split(client);
    let (from_server, to_server) = split(server);
    // Ends when one side closes the connection.
    tokio::select! {
        _ = copy(from_client, to_server, link.clone()) => {}
        _ = copy(from_server, to_client, link) => {}
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut link: Link,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        if !link.passes().await {
            // The proxy was dropped, and the bytes that it held back are lost.
            return Ok(());
        }
        to.write_all(&buffer[..count]).await?;
    }
}

/// Returns the options for the same database through a proxy at this address.
pub fn options_via(address: SocketAddr, options: &PgConnectOptions) -> PgConnectOptions {
    let mut url = options.to_url_lossy();
    url.set_query(None);
    url.set_host(Some("127.0.0.1")).expect("a URL with a host");
    url.set_port(Some(address.port())).expect("a URL with a port");
    url.as_str().parse().expect("a valid URL")
}
