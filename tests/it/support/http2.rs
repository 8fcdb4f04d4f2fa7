//! Handmade HTTP/2, for frames that no library sends.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr},
};

use tokio::{
    io::{self, AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, tcp::OwnedWriteHalf},
    task::JoinHandle,
};

use super::{priority::yield_between_polls, wait::with_timeout};

/// The connection preface of a client, with an empty SETTINGS frame.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Frame types (RFC 9113, section 6).
pub const DATA: u8 = 0x0;
pub const HEADERS: u8 = 0x1;
pub const RST_STREAM: u8 = 0x3;
pub const SETTINGS: u8 = 0x4;
pub const PING: u8 = 0x6;
pub const GOAWAY: u8 = 0x7;
pub const WINDOW_UPDATE: u8 = 0x8;
pub const CONTINUATION: u8 = 0x9;

/// Frame flags.
pub const END_STREAM: u8 = 0x1;
pub const END_HEADERS: u8 = 0x4;
/// Of PING and SETTINGS frames.
const ACK: u8 = 0x1;

/// Settings (RFC 9113, section 6.5.2).
pub const MAX_CONCURRENT_STREAMS: u16 = 0x3;
pub const INITIAL_WINDOW_SIZE: u16 = 0x4;
pub const MAX_HEADER_LIST_SIZE: u16 = 0x6;

/// Another loopback address, which the service counts as another client.
pub const OTHER_CLIENT_IP: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// Encodes a frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a valid frame length");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// Encodes a SETTINGS frame with one setting.
pub fn settings_frame(id: u16, value: u32) -> Vec<u8> {
    let payload = [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    frame(SETTINGS, 0, 0, &payload)
}

/// Encodes the header block of a call. Method and scheme are indexed; all other headers are
/// literals without indexing (RFC 7541, section 6.2.2).
pub fn header_block(path: &str, extra: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    let required = [
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    for (name, value) in required.iter().chain(extra) {
        block.extend(literal_header(0x00, name, value));
    }
    block
}

/// Encodes a literal header, without indexing (0x00) or with incremental indexing (0x40).
pub fn literal_header(representation: u8, name: &str, value: &str) -> Vec<u8> {
    let mut header = vec![representation];
    for text in [name, value] {
        header.extend(encode_integer(text.len()));
        header.extend(text.as_bytes());
    }
    header
}

/// Encodes an integer with a prefix of seven bits (RFC 7541, section 5.1).
fn encode_integer(value: usize) -> Vec<u8> {
    let Some(mut rest) = value.checked_sub(0x7f) else {
        return vec![u8::try_from(value).expect("small")];
    };
    let mut bytes = vec![0x7f];
    while rest >= 0x80 {
        bytes.push(0x80 | u8::try_from(rest % 0x80).expect("seven bits"));
        rest /= 0x80;
    }
    bytes.push(u8::try_from(rest).expect("seven bits"));
    bytes
}

/// Encodes a length-prefixed message of gRPC.
pub fn length_prefixed(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a valid message length");
    [&[0][..], &length.to_be_bytes(), bytes].concat()
}

/// Connects from an address of this machine.
pub async fn connect_from(to: SocketAddr, from: Ipv4Addr) -> io::Result<TcpStream> {
    bind_and_connect(TcpSocket::new_v4()?, to, from).await
}

/// Connects with the smallest possible receive buffer, so that unread bytes soon block the
/// server.
pub async fn connect_without_reading(to: SocketAddr, from: Ipv4Addr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(1)?;
    bind_and_connect(socket, to, from).await
}

async fn bind_and_connect(
    socket: TcpSocket,
    to: SocketAddr,
    from: Ipv4Addr,
) -> io::Result<TcpStream> {
    socket.bind(SocketAddr::from((from, 0)))?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Connects and sends bytes.
pub async fn connect_raw(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    // The server may close the connection immediately.
    let _ = stream.write_all(bytes).await;
    stream
}

/// Reads until the server closes the connection, and returns the bytes.
pub async fn read_until_closed(stream: &mut (impl AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    match with_timeout("the end of the connection", stream.read_to_end(&mut bytes)).await {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    bytes
}

/// A received frame.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Returns the frame that acknowledges this one, if it is a PING. The server closes a connection
    /// that does not acknowledge one within 20 seconds.
    pub fn ping_acknowledgment(&self) -> Option<Vec<u8>> {
        let is_ping = self.kind == PING && self.flags & ACK == 0;
        is_ping.then(|| frame(PING, ACK, 0, &self.payload))
    }
}

/// Reads the next frame. Returns an error if the connection is closed.
pub async fn read_frame(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let [a, b, c, kind, flags, stream_id @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    stream.read_exact(&mut payload).await?;
    Ok(Frame { kind, flags, stream: u32::from_be_bytes(stream_id), payload })
}

/// A connection that sends arbitrary frames. It discards all received bytes, so that the
/// server can always write.
pub struct RawHttp2 {
    stream: OwnedWriteHalf,
    reader: JoinHandle<()>,
    next_stream_id: u32,
}

impl RawHttp2 {
    pub async fn connect(to: SocketAddr, from: Ipv4Addr) -> io::Result<Self> {
        let (mut read, mut write) = connect_from(to, from).await?.into_split();
        write.write_all(PREFACE).await?;
        let reader = tokio::spawn(async move {
            let _ = yield_between_polls(io::copy(&mut read, &mut io::sink())).await;
        });
        Ok(Self { stream: write, reader, next_stream_id: 1 })
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.reader.is_finished() {
            return Err(ErrorKind::ConnectionReset.into());
        }
        yield_between_polls(self.stream.write_all(bytes)).await
    }

    /// Returns the ID of a new stream.
    pub fn next_stream_id(&mut self) -> u32 {
        self.next_stream_id += 2;
        self.next_stream_id - 2
    }

    /// Waits until the server closes the connection.
    pub async fn wait_until_closed(&mut self) {
        let _ = (&mut self.reader).await;
    }
}

impl Drop for RawHttp2 {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
