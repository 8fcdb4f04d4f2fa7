//! A way to PostgreSQL that a test can open, freeze and close.

use std::{io, net::SocketAddr, path::PathBuf};

use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

/// Forwards connections to PostgreSQL as long as it lives.
pub struct Proxy {
    closed: CancellationToken,
    frozen: watch::Sender<bool>,
}

impl Proxy {
    /// An address at which nothing listens, until a proxy is opened there.
    pub async fn reserve() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        listener.local_addr().expect("it is bound")
    }

    /// Forwards from this address.
    pub async fn open(address: SocketAddr, to: &PgConnectOptions) -> Self {
        let listener = TcpListener::bind(address).await.expect("the port is still free");
        let closed = CancellationToken::new();
        let target = Target::of(to);
        let (frozen, is_frozen) = watch::channel(false);
        tokio::spawn(closed.clone().run_until_cancelled_owned(forward(
            listener,
            target,
            is_frozen,
            closed.clone(),
        )));
        Self { closed, frozen }
    }

    /// Holds all bytes back: connections stay open and can be opened, and nothing answers,
    /// as with a server that was stopped by SIGSTOP.
    pub fn freeze(&self) {
        self.frozen.send_replace(true);
    }

    /// Lets go of what was held back.
    pub fn thaw(&self) {
        self.frozen.send_replace(false);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

#[derive(Clone)]
enum Target {
    Socket(PathBuf),
    Tcp(String, u16),
}

impl Target {
    fn of(options: &PgConnectOptions) -> Self {
        match options.get_socket() {
            Some(folder) => Self::Socket(folder.join(format!(".s.PGSQL.{}", options.get_port()))),
            None => Self::Tcp(options.get_host().to_owned(), options.get_port()),
        }
    }
}

async fn forward(
    listener: TcpListener,
    target: Target,
    is_frozen: watch::Receiver<bool>,
    closed: CancellationToken,
) {
    while let Ok((client, _)) = listener.accept().await {
        let (target, is_frozen, closed) = (target.clone(), is_frozen.clone(), closed.clone());
        tokio::spawn(closed.run_until_cancelled_owned(async move {
            match target {
                Target::Socket(path) => {
                    copy(client, UnixStream::connect(path).await, is_frozen).await;
                }
                Target::Tcp(host, port) => {
                    copy(client, TcpStream::connect((host, port)).await, is_frozen).await;
                }
            }
        }));
    }
}

async fn copy<S: AsyncRead + AsyncWrite>(
    client: TcpStream,
    server: io::Result<S>,
    is_frozen: watch::Receiver<bool>,
) {
    let Ok(server) = server else {
        return;
    };
    let (from_client, to_client) = split(client);
    let (from_server, to_server) = split(server);
    // Ends when one side does.
    tokio::select! {
        _ = pump(from_client, to_server, is_frozen.clone()) => {}
        _ = pump(from_server, to_client, is_frozen) => {}
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut is_frozen: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        // An error means that the proxy is gone, and this with it.
        let _ = is_frozen.wait_for(|is_frozen| !is_frozen).await;
        to.write_all(&buffer[..count]).await?;
    }
}

/// The same database by way of a proxy's address.
pub fn through(address: SocketAddr, options: &PgConnectOptions) -> PgConnectOptions {
    let mut url = options.to_url_lossy();
    url.set_query(None);
    url.set_host(Some("127.0.0.1")).expect("a URL with a host");
    url.set_port(Some(address.port())).expect("a URL with a port");
    url.as_str().parse().expect("still a URL")
}
