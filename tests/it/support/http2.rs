//! HTTP/2 by hand, for what no library would send.

use std::{
    io::ErrorKind,
    net::{Ipv4Addr, SocketAddr},
};

use tokio::{
    io::{self, AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, tcp::OwnedWriteHalf},
    task::JoinHandle,
};

use super::{priority::giving_way, wait::in_time};

/// What a client says first, and its settings, of which there are none.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Kinds of frames (RFC 9113, section 6).
pub const DATA: u8 = 0x0;
pub const HEADERS: u8 = 0x1;
pub const RST_STREAM: u8 = 0x3;
pub const SETTINGS: u8 = 0x4;
pub const PING: u8 = 0x6;
pub const GOAWAY: u8 = 0x7;
pub const WINDOW_UPDATE: u8 = 0x8;
pub const CONTINUATION: u8 = 0x9;

/// Flags of frames.
pub const END_STREAM: u8 = 0x1;
pub const END_HEADERS: u8 = 0x4;

/// The settings INITIAL_WINDOW_SIZE.
pub const INITIAL_WINDOW_SIZE: u16 = 0x4;

/// This machine by an address of its own: for the service, another peer.
pub const OTHER_PEER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// A frame as it is sent.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame of a size that can be sent");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// One setting.
pub fn setting(id: u16, value: u32) -> Vec<u8> {
    let payload = [&id.to_be_bytes()[..], &value.to_be_bytes()].concat();
    frame(SETTINGS, 0, 0, &payload)
}

/// The header block of a call, each header as a literal that no table keeps, but for those
/// of the method and the scheme (RFC 7541, section 6.2.2).
pub fn call(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    let always = [
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    for (name, value) in always.iter().chain(more) {
        block.extend(literal(0x00, name, value));
    }
    block
}

/// A header of which the table keeps nothing (0x00), or that it is to keep (0x40).
pub fn literal(kind: u8, name: &str, value: &str) -> Vec<u8> {
    let mut header = vec![kind];
    for text in [name, value] {
        header.extend(integer(text.len()));
        header.extend(text.as_bytes());
    }
    header
}

/// With a prefix of seven bits (RFC 7541, section 5.1).
fn integer(value: usize) -> Vec<u8> {
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

/// A message as gRPC frames it.
pub fn message(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a message of a size that can be sent");
    [&[0][..], &length.to_be_bytes(), bytes].concat()
}

/// A connection from an address of this machine.
pub async fn tcp(to: SocketAddr, from: Ipv4Addr) -> io::Result<TcpStream> {
    connect(TcpSocket::new_v4()?, to, from).await
}

/// The same with as small a buffer for what is not read as can be.
pub async fn deaf(to: SocketAddr, from: Ipv4Addr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(1)?;
    connect(socket, to, from).await
}

async fn connect(socket: TcpSocket, to: SocketAddr, from: Ipv4Addr) -> io::Result<TcpStream> {
    socket.bind(SocketAddr::from((from, 0)))?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection that has said this.
pub async fn raw(address: SocketAddr, said: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    // The server may close it at once.
    let _ = stream.write_all(said).await;
    stream
}

/// Waits until the server closes a connection; what it said before.
pub async fn closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    match in_time("the end of the connection", stream.read_to_end(&mut said)).await {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    said
}

/// A frame as it is received.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub stream: u32,
}

/// Reads the next frame; an error at the end of the connection.
pub async fn next_frame(stream: &mut TcpStream) -> io::Result<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let [a, b, c, kind, _, stream_id @ ..] = head;
    let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
    stream.read_exact(&mut payload).await?;
    Ok(Frame { kind, stream: u32::from_be_bytes(stream_id) })
}

/// A connection on which everything may be sent. What comes is thrown away, so that it
/// does not hold up what is sent.
pub struct Sender {
    stream: OwnedWriteHalf,
    reading: JoinHandle<()>,
    next_id: u32,
}

impl Sender {
    pub async fn connect(to: SocketAddr, from: Ipv4Addr) -> io::Result<Self> {
        let (mut read, mut write) = tcp(to, from).await?.into_split();
        write.write_all(PREFACE).await?;
        let reading = tokio::spawn(async move {
            let _ = giving_way(io::copy(&mut read, &mut io::sink())).await;
        });
        Ok(Self { stream: write, reading, next_id: 1 })
    }

    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.reading.is_finished() {
            return Err(ErrorKind::ConnectionReset.into());
        }
        giving_way(self.stream.write_all(bytes)).await
    }

    /// The id of a new stream.
    pub fn new_id(&mut self) -> u32 {
        self.next_id += 2;
        self.next_id - 2
    }

    /// Waits until the server ends the connection.
    pub async fn closed(&mut self) {
        let _ = (&mut self.reading).await;
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.reading.abort();
    }
}
