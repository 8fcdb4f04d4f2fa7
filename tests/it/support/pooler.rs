//! A connection pooler that refuses startup parameters, as PgBouncer does.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_util::task::AbortOnDropHandle;

/// The code of an `SSLRequest` (PostgreSQL's manual, message formats).
const SSL_REQUEST: &[u8] = &80_877_103_u32.to_be_bytes();

/// A pooler in front of a server, until it is dropped.
pub struct Pooler {
    pub address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

impl Pooler {
    pub async fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, server));
            }
        });
        Self { address, _task: AbortOnDropHandle::new(task) }
    }
}

async fn serve(mut client: TcpStream, server: SocketAddr) -> io::Result<()> {
    let mut startup = read_startup(&mut client).await?;
    if startup[4..].starts_with(SSL_REQUEST) {
        client.write_all(b"N").await?;
        startup = read_startup(&mut client).await?;
    }
    if startup.windows(9).any(|bytes| bytes == b"\0options\0") {
        let fields = "SFATAL\0VFATAL\0C08P01\0Munsupported startup parameter: options\0\0";
        let len = u32::try_from(fields.len() + 4).expect("a short message");
        client.write_all(b"E").await?;
        client.write_all(&len.to_be_bytes()).await?;
        return client.write_all(fields.as_bytes()).await;
    }
    let mut server = TcpStream::connect(server).await?;
    server.write_all(&startup).await?;
    copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

/// Reads a message without a type, and returns it with its length.
async fn read_startup(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let len = client.read_u32().await?;
    let mut message = len.to_be_bytes().to_vec();
    message.resize(len as usize, 0);
    client.read_exact(&mut message[4..]).await?;
    Ok(message)
}
