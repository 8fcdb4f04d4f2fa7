//! A TCP proxy for PostgreSQL that counts the statements that pass, by their text. It sees every
//! statement of a server in a process of its own, without an extension of PostgreSQL.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::{
    io::{self, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    net::{TcpListener, TcpStream, UnixStream},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::proxy::options_via;

/// The texts of statements, with how often each was executed.
pub type StatementCounts = HashMap<String, u64>;

/// A proxy. It stops when it is dropped.
pub struct StatementProxy {
    address: SocketAddr,
    upstream: PgConnectOptions,
    counts: Arc<Mutex<StatementCounts>>,
    _close: DropGuard,
}

impl StatementProxy {
    /// Starts a proxy for this database.
    pub async fn start(upstream: &PgConnectOptions) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let (counts, closed) = (Arc::<Mutex<StatementCounts>>::default(), CancellationToken::new());
        let accepting = accept(listener, upstream.clone(), counts.clone(), closed.clone());
        tokio::spawn(closed.clone().run_until_cancelled_owned(accepting));
        Self { address, upstream: upstream.clone(), counts, _close: closed.drop_guard() }
    }

    /// Returns the URL of the database through the proxy, which cannot read TLS.
    pub fn url(&self) -> String {
        let mut url = options_via(self.address, &self.upstream).to_url_lossy();
        url.set_query(Some("sslmode=disable"));
        url.to_string()
    }

    /// Returns all counts so far.
    pub fn counts(&self) -> StatementCounts {
        self.counts.lock().expect("not poisoned").clone()
    }

    /// Returns how many statements that contain this text were executed.
    pub fn count(&self, text: &str) -> u64 {
        count(&self.counts(), text)
    }
}

/// Returns how many statements that contain this text were executed.
pub fn count(counts: &StatementCounts, text: &str) -> u64 {
    counts.iter().filter(|(statement, _)| statement.contains(text)).map(|(_, count)| count).sum()
}

async fn accept(
    listener: TcpListener,
    upstream: PgConnectOptions,
    counts: Arc<Mutex<StatementCounts>>,
    closed: CancellationToken,
) {
    while let Ok((client, _)) = listener.accept().await {
        let (upstream, counts) = (upstream.clone(), counts.clone());
        tokio::spawn(closed.clone().run_until_cancelled_owned(async move {
            let port = upstream.get_port();
            if let Some(dir) = upstream.get_socket() {
                let server = UnixStream::connect(dir.join(format!(".s.PGSQL.{port}"))).await;
                forward(client, server, counts).await
            } else {
                let server = TcpStream::connect((upstream.get_host(), port)).await;
                forward(client, server, counts).await
            }
        }));
    }
}

/// Forwards until one side closes the connection.
async fn forward<S: AsyncRead + AsyncWrite>(
    client: TcpStream,
    server: io::Result<S>,
    counts: Arc<Mutex<StatementCounts>>,
) -> io::Result<()> {
    let (from_client, mut to_client) = split(client);
    let (mut from_server, to_server) = split(server?);
    tokio::select! {
        result = forward_statements(from_client, to_server, &counts) => result,
        result = io::copy(&mut from_server, &mut to_client) => result.map(drop),
    }
}

/// Forwards the messages of a client (PostgreSQL, "Message Formats"), and counts what they execute.
async fn forward_statements(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    counts: &Mutex<StatementCounts>,
) -> io::Result<()> {
    // The first message has no type.
    let startup = read_message(&mut from).await?;
    to.write_all(&startup).await?;
    let mut prepared = HashMap::new();
    loop {
        let kind = from.read_u8().await?;
        let message = read_message(&mut from).await?;
        let mut parts = message[4..].split(|byte| *byte == 0);
        let mut text = || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
        let executed = match kind {
            // Query.
            b'Q' => Some(text()),
            // Parse: the name and the text.
            b'P' => {
                prepared.insert(text(), text());
                None
            }
            // Bind: the portal and the name.
            b'B' => {
                text();
                prepared.get(&text()).cloned()
            }
            _ => None,
        };
        if let Some(statement) = executed {
            *counts.lock().expect("not poisoned").entry(statement).or_default() += 1;
        }
        to.write_all(&[&[kind], &*message].concat()).await?;
    }
}

/// Reads a length and the rest of the message.
async fn read_message(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let length = from.read_u32().await?;
    let mut message = length.to_be_bytes().to_vec();
    message.resize(length as usize, 0);
    from.read_exact(&mut message[4..]).await?;
    Ok(message)
}
