//! Streams: a response that is not buffered holds its permit and memory until it is sent, and
//! ends with a status when it has to.
//!
//! A stream ends at the client's deadline, at the expiry of the token, with the session or the
//! personal access token, when its connection drains (maximum age, idle, shutdown), or, for
//! reflection, at its maximum age. There is no channel between the handler and HTTP/2: the body
//! polls the handler when the flow-control window is open (backpressure).

use std::{
    future::pending,
    sync::Arc,
    task::{Context as TaskContext, Poll},
};

use http::Response;
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep_until};
use tokio_util::{either::Either, sync::CancellationToken};
use tonic::body::Body;
use tower::Service;

use super::{
    ResponseFuture,
    call::{Call, StreamCredential},
    streaming_body::{HeldUntilSent, StreamingBody},
};
use crate::rpc::{
    error::Error,
    policy::{MAX_REFLECTION_STREAM_AGE, System},
};

#[derive(Clone, Debug)]
pub(super) struct Stream<S> {
    inner: S,
}

impl<S> Stream<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S, B> Service<Call<B>> for Stream<S>
where
    S: Service<Call<B>, Response = Response<Body>, Error = Error>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<S::Future, ResponseFuture>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut call: Call<B>) -> Self::Future {
        let Some(guards) = call.stream_guards.take() else {
            return Either::Left(self.inner.call(call));
        };
        let end = call.is_stream().then(|| StreamEnd::new(&mut call));
        let connection = call.connection.clone();
        let open = call.open_stream.take();
        let response = self.inner.call(call);
        Either::Right(Box::pin(async move {
            let response = response.await?;
            // An error before the first message: the headers end the stream.
            if response.body().is_end_stream() {
                return Ok(response);
            }
            let guards = Arc::new(HeldUntilSent::new(guards));
            Ok(response.map(|body| {
                if let Some(end) = end {
                    return StreamingBody::wrap(body, guards, connection, open, end.wait());
                }
                // A unary response of a system service: small, and not buffered.
                guards.end(&connection);
                Body::new(body.map_frame(move |frame| guards.clone().attach(frame)))
            }))
        }))
    }
}

/// What ends a stream before its handler does.
struct StreamEnd {
    deadline: Option<Instant>,
    credential: Option<StreamCredential>,
    drain: CancellationToken,
}

impl StreamEnd {
    fn new<B>(call: &mut Call<B>) -> Self {
        let is_reflection =
            call.method.is_some_and(|method| method.system == Some(System::Reflection));
        let max_age = is_reflection.then(|| call.received_at + MAX_REFLECTION_STREAM_AGE);
        Self {
            deadline: call.client_deadline().into_iter().chain(max_age).min(),
            credential: call.stream_credential.take(),
            drain: call.connection.drain.clone(),
        }
    }

    /// Waits until the stream has to end, and returns why.
    async fn wait(self) -> Error {
        let Self { deadline, credential, drain } = self;
        let credential = credential.as_ref();
        tokio::select! {
            () = drain.cancelled() => Error::Stopping,
            () = or_never(deadline.map(sleep_until)) => Error::DeadlineExceeded,
            server_time = or_never(credential.map(StreamCredential::expired)) => {
                Error::TokenExpired { server_time }
            }
            error = or_never(credential.map(|it| it.watch.ended())) => error,
        }
    }
}

/// Waits for an event, or forever if it cannot happen.
async fn or_never<T>(event: Option<impl Future<Output = T>>) -> T {
    match event {
        Some(event) => event.await,
        None => pending().await,
    }
}
