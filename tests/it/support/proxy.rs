//! A way to PostgreSQL that a test can open and close.

use std::{net::SocketAddr, path::PathBuf};

use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{
    io::{AsyncRead, AsyncWrite, copy_bidirectional},
    net::{TcpListener, TcpStream, UnixStream},
};
use tokio_util::sync::CancellationToken;

/// Forwards connections to PostgreSQL as long as it lives.
pub struct Proxy {
    closed: CancellationToken,
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
        tokio::spawn(closed.clone().run_until_cancelled_owned(forward(
            listener,
            target,
            closed.clone(),
        )));
        Self { closed }
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

async fn forward(listener: TcpListener, target: Target, closed: CancellationToken) {
    while let Ok((client, _)) = listener.accept().await {
        let (target, closed) = (target.clone(), closed.clone());
        tokio::spawn(closed.run_until_cancelled_owned(async move {
            match target {
                Target::Socket(path) => copy(client, UnixStream::connect(path).await).await,
                Target::Tcp(host, port) => {
                    copy(client, TcpStream::connect((host, port)).await).await;
                }
            }
        }));
    }
}

async fn copy<S: AsyncRead + AsyncWrite + Unpin>(
    mut client: TcpStream,
    server: std::io::Result<S>,
) {
    if let Ok(mut server) = server {
        // Ends when one side does.
        let _ = copy_bidirectional(&mut client, &mut server).await;
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
