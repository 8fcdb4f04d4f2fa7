//! A connection without what tonic's own channel does with calls: it sends any bytes to
//! any method, and leaves deadlines to the server.

use std::{
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};

use http::Uri;
use hyper::{
    body::Incoming,
    client::conn::http2::{SendRequest, handshake},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::bytes::{Buf, BufMut};
use tokio::net::TcpStream;
use tonic::{
    Request, Status,
    body::Body,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::{Ascii, MetadataKey, MetadataValue},
};
use tower::Service;

use super::{App, Client, todos::Answer};

/// A caller on such a connection.
#[derive(Clone)]
pub struct Wire {
    connection: Connection,
    origin: Uri,
    metadata: Vec<(&'static str, MetadataValue<Ascii>)>,
}

impl App {
    /// A caller without a token.
    pub async fn wire(&self) -> Wire {
        Wire::connect(self.address).await
    }
}

impl Wire {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.expect("the server answers");
        stream.set_nodelay(true).expect("set");
        let (sender, connection) =
            handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
        tokio::spawn(connection);
        let origin = format!("http://{address}").parse().expect("a good address");
        Self { connection: Connection(sender), origin, metadata: Vec::new() }
    }

    /// The same caller with one more metadata entry, after those it has.
    pub fn with(self, key: &'static str, value: impl Into<String>) -> Self {
        let value = MetadataValue::try_from(value.into()).expect("a metadata value");
        self.with_value(key, value)
    }

    /// The same caller with one more metadata entry, which may be no text.
    pub fn with_value(mut self, key: &'static str, value: MetadataValue<Ascii>) -> Self {
        self.metadata.push((key, value));
        self
    }

    /// The same caller with another one's access token.
    pub fn with_token_of(self, client: &Client) -> Self {
        self.with("authorization", format!("Bearer {}", client.tokens().access_token))
    }

    /// Sends one message and expects one.
    pub async fn call(&self, path: &str, message: &[u8]) -> Answer<Vec<u8>> {
        let mut request = Request::new(message.to_vec());
        for (key, value) in &self.metadata {
            request.metadata_mut().append(MetadataKey::from_static(key), value.clone());
        }
        let mut grpc = Grpc::with_origin(self.connection.clone(), self.origin.clone());
        grpc.ready().await.expect("the connection lives");
        grpc.unary(request, path.parse().expect("a path"), Bytes).await
    }
}

#[derive(Clone)]
struct Connection(SendRequest<Body>);

impl Service<http::Request<Body>> for Connection {
    type Response = http::Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// Messages as they are.
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, message: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(&message);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut message = vec![0; from.remaining()];
        from.copy_to_slice(&mut message);
        Ok(Some(message))
    }
}
