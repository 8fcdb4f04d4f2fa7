//! A gRPC client for all servers.
//!
//! It competes with the servers for CPU time, so it is as cheap as possible: the generated
//! clients on one HTTP/2 connection, without the reconnection of
//! `tonic::transport::Channel`.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use fast_zero::proto::{
    auth::v1::auth_service_client::AuthServiceClient,
    todo::v1::todo_service_client::TodoServiceClient,
    user::v1::user_service_client::UserServiceClient,
};
use http::{Request, Response, Uri};
use hyper::{
    body::Incoming,
    client::conn::http2::{self, SendRequest},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tonic::body::Body;
use tower::Service;

use crate::error::Result;

/// The clients of all services, on one connection.
#[derive(Clone, Debug)]
pub struct Client {
    pub auth: AuthServiceClient<Connection>,
    pub todos: TodoServiceClient<Connection>,
    pub users: UserServiceClient<Connection>,
}

impl Client {
    /// Connects to a server, given its host and port.
    pub async fn connect(address: &str) -> Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) =
            http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
        // The calls report the errors of the connection.
        tokio::spawn(connection);
        let (connection, origin) =
            (Connection(sender), Uri::try_from(format!("http://{address}"))?);
        Ok(Self {
            auth: AuthServiceClient::with_origin(connection.clone(), origin.clone()),
            todos: TodoServiceClient::with_origin(connection.clone(), origin.clone()),
            users: UserServiceClient::with_origin(connection, origin),
        })
    }
}

/// One HTTP/2 connection as the `tower::Service` that the generated clients expect.
#[derive(Clone, Debug)]
pub struct Connection(SendRequest<Body>);

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
