//! A gRPC client without the features of tonic's channel: it sends arbitrary bytes to any
//! method, and enforces no deadlines.

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

use super::{App, Client, RpcResult, http2::connect_from, priority::yield_between_polls};

/// A client with one connection.
#[derive(Clone)]
pub struct RawClient {
    connection: Connection,
    origin: Uri,
    metadata: Vec<(&'static str, MetadataValue<Ascii>)>,
}

impl App {
    /// Connects a client without a token.
    pub async fn raw_client(&self) -> RawClient {
        RawClient::connect(self.address).await
    }
}

impl RawClient {
    pub async fn connect(address: SocketAddr) -> Self {
        let client = Self::connect_from(Ipv4Addr::LOCALHOST, address, None).await;
        client.expect("the server accepts connections")
    }

    /// Connects from an address of this machine, with this flow-control window for each
    /// stream.
    pub async fn connect_from(
        from: Ipv4Addr,
        address: SocketAddr,
        window: impl Into<Option<u32>>,
    ) -> io::Result<Self> {
        let stream = TokioIo::new(connect_from(address, from).await?);
        let mut builder = Builder::new(TokioExecutor::new());
        let handshake = builder.initial_stream_window_size(window).handshake(stream);
        let (sender, connection) = handshake.await.map_err(io::Error::other)?;
        tokio::spawn(yield_between_polls(connection));
        let origin = format!("http://{address}").parse().expect("a valid URL");
        Ok(Self { connection: Connection(sender), origin, metadata: Vec::new() })
    }

    /// Returns `true` if the server has closed the connection.
    pub fn is_closed(&self) -> bool {
        self.connection.0.is_closed()
    }

    /// Sends a body, and returns the response as soon as it starts.
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

    /// Sends a request of which nothing is set but the path.
    pub async fn send_http(
        &mut self,
        request: http::request::Builder,
        path: &str,
        body: Body,
    ) -> http::Response<Incoming> {
        let uri = format!("{}{path}", self.origin.to_string().trim_end_matches('/'));
        let request = request.uri(uri).body(body).expect("a request");
        self.connection.0.ready().await.expect("an open connection");
        self.connection.0.send_request(request).await.expect("a response")
    }

    /// Appends a metadata entry.
    pub fn with_metadata(self, key: &'static str, value: impl Into<String>) -> Self {
        let value = MetadataValue::try_from(value.into()).expect("a metadata value");
        self.with_metadata_value(key, value)
    }

    /// Appends a metadata entry, which may be no text.
    pub fn with_metadata_value(mut self, key: &'static str, value: MetadataValue<Ascii>) -> Self {
        self.metadata.push((key, value));
        self
    }

    /// Adds the access token of a client.
    pub fn with_token_of(self, client: &Client) -> Self {
        self.with_metadata("authorization", format!("Bearer {}", client.tokens().access_token))
    }

    /// Makes a unary call.
    pub async fn call(&self, path: &str, message: &[u8]) -> RpcResult<Vec<u8>> {
        let request = self.request(message);
        self.grpc().await.unary(request, path.parse().expect("a path"), RawCodec).await
    }

    /// Opens a server stream, and returns its first message. The metadata of an error includes that
    /// of the response.
    pub async fn first_message(&self, path: &str, message: &[u8]) -> RpcResult<Vec<u8>> {
        let (mut grpc, request) = (self.grpc().await, self.request(message));
        let response = grpc.server_streaming(request, path.parse().expect("a path"), RawCodec);
        let (metadata, mut stream, _) = response.await?.into_parts();
        match stream.message().await {
            Ok(Some(message)) => Ok(Response::new(message)),
            Ok(None) => Err(Status::unknown("no message")),
            Err(mut status) => {
                if let Some(id) = metadata.get("x-request-id") {
                    status.metadata_mut().insert("x-request-id", id.clone());
                }
                Err(status)
            }
        }
    }

    fn request(&self, message: &[u8]) -> Request<Vec<u8>> {
        let mut request = Request::new(message.to_vec());
        for (key, value) in &self.metadata {
            request.metadata_mut().append(MetadataKey::from_static(key), value.clone());
        }
        request
    }

    async fn grpc(&self) -> Grpc<Connection> {
        let mut grpc = Grpc::with_origin(self.connection.clone(), self.origin.clone());
        grpc.ready().await.expect("an open connection");
        grpc
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

/// A codec for encoded messages.
struct RawCodec;

impl Codec for RawCodec {
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

impl Encoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, message: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&message);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut message = vec![0; buffer.remaining()];
        buffer.copy_to_slice(&mut message);
        Ok(Some(message))
    }
}

/// Reads a response to its end.
pub async fn read_rpc_result(response: http::Response<Incoming>) -> RpcResult<Vec<u8>> {
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

/// Returns a body that starts with these bytes and does not end.
pub fn unfinished_body(start: impl Into<prost::bytes::Bytes>) -> Body {
    let start = Ok::<_, io::Error>(http_body::Frame::data(start.into()));
    Body::new(StreamBody::new(tokio_stream::iter([start]).chain(tokio_stream::pending())))
}

/// Returns a complete body.
pub fn full_body(bytes: impl Into<prost::bytes::Bytes>) -> Body {
    Body::new(Full::new(bytes.into()))
}
