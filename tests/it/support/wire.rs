//! A connection without what tonic's own channel does with calls: it sends any bytes to
//! any method, and leaves deadlines to the server.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
};

use http::Uri;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::{
    body::Incoming,
    client::conn::http2::{Builder, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::bytes::{Buf, BufMut};
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::tokio_stream::{self, StreamExt},
    metadata::{Ascii, MetadataKey, MetadataValue},
};
use tower::Service;

use super::{App, Client, http2::tcp, priority::giving_way, todos::Answer};

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
        let connected = Self::connect_from(Ipv4Addr::LOCALHOST, address, None).await;
        connected.expect("the server answers")
    }

    /// From an address of this machine, with so many bytes that the server may send of one
    /// answer before they are read.
    pub async fn connect_from(
        from: Ipv4Addr,
        address: SocketAddr,
        window: impl Into<Option<u32>>,
    ) -> io::Result<Self> {
        let stream = TokioIo::new(tcp(address, from).await?);
        let mut builder = Builder::new(TokioExecutor::new());
        let handshake = builder.initial_stream_window_size(window).handshake(stream);
        let (sender, connection) = handshake.await.map_err(io::Error::other)?;
        tokio::spawn(giving_way(connection));
        let origin = format!("http://{address}").parse().expect("a good address");
        Ok(Self { connection: Connection(sender), origin, metadata: Vec::new() })
    }

    /// Whether the server has ended the connection.
    pub fn is_closed(&self) -> bool {
        self.connection.0.is_closed()
    }

    /// Sends any body; the answer is there when it begins.
    pub async fn send(
        &mut self,
        path: &str,
        body: Body,
    ) -> hyper::Result<http::Response<Incoming>> {
        let mut request =
            http::Request::post(format!("{}{path}", self.origin.to_string().trim_end_matches('/')))
                .header("content-type", "application/grpc")
                .header("te", "trailers");
        for (key, value) in &self.metadata {
            request = request.header(*key, value.as_bytes());
        }
        self.connection.0.ready().await?;
        self.connection.0.send_request(request.body(body).expect("a request")).await
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

/// What an answer says, once it is whole.
pub async fn outcome(response: http::Response<Incoming>) -> Answer<Vec<u8>> {
    if let Some(status) = Status::from_header_map(response.headers()) {
        return Err(status);
    }
    let (_, body) = response.into_parts();
    let body = body.collect().await.map_err(|error| Status::unknown(error.to_string()))?;
    match body.trailers().and_then(Status::from_header_map) {
        Some(status) if status.code() == Code::Ok => Ok(Response::new(body.to_bytes().to_vec())),
        Some(status) => Err(status),
        None => Err(Status::unknown("no trailers")),
    }
}

/// A body that begins so and does not end.
pub fn endless(begin: impl Into<prost::bytes::Bytes>) -> Body {
    let begin = Ok::<_, io::Error>(http_body::Frame::data(begin.into()));
    Body::new(StreamBody::new(tokio_stream::iter([begin]).chain(tokio_stream::pending())))
}

/// A whole body.
pub fn whole(bytes: impl Into<prost::bytes::Bytes>) -> Body {
    Body::new(Full::new(bytes.into()))
}
