//! Decompression of buffered requests: after authentication, because a few bytes from any client
//! would otherwise cost milliseconds.

use std::{
    sync::Arc,
    task::{Context as TaskContext, Poll},
};

use http::Response;
use http_body_util::{Either as EitherBody, Full};
use tokio_util::either::Either;
use tonic::body::Body;
use tower::Service;

use super::{
    Context, ResponseFuture,
    buffer::{RequestBody, to_kib},
    call::Call,
    compression::{decompress, failed_body},
};
use crate::{
    limits::{MAX_REQUEST_BYTES, admission::MemoryReservation},
    rpc::{error::Error, protocol::ProtocolError},
};

/// The size up to which a message is decompressed on the thread of the call, in bytes: a fraction
/// of a millisecond. A larger one would delay the other calls of the thread.
///
/// Test: `other_clients_are_unaffected`.
const MAX_INLINE_BYTES: usize = 64 * 1024;

#[derive(Clone, Debug)]
pub(super) struct Decompression<S> {
    inner: S,
}

impl<S> Decompression<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Call<RequestBody>> for Decompression<S>
where
    S: Service<Call<RequestBody>, Response = Response<Body>, Error = Error>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<S::Future, ResponseFuture>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut call: Call<RequestBody>) -> Self::Future {
        let Some(message) = call.compressed.take() else {
            return Either::Left(self.inner.call(call));
        };
        let mut inner = self.inner.clone();
        Either::Right(Box::pin(async move {
            // Of the same budget as the compressed message, and in addition to it.
            let memory = call.context.admission.reserve(&call.quota, 0)?;
            let (decompressed, memory) =
                decompress_within(call.context.clone(), message, memory).await?;
            let body = match decompressed {
                Ok(message) => EitherBody::Left(Full::new(message.into())),
                Err(Error::Overloaded) => return Err(Error::Overloaded),
                Err(error) => EitherBody::Right(failed_body(error)),
            };
            let response = inner.call(call.map_body(|_| body)).await;
            // The handler has read the request.
            drop(memory);
            response
        }))
    }
}

/// Decompresses a message within a reservation.
async fn decompress_within(
    context: Arc<Context>,
    message: Vec<u8>,
    mut memory: MemoryReservation,
) -> Result<(Result<Vec<u8>, Error>, MemoryReservation), Error> {
    let decompress = move |message: &[u8], max_len, mut memory| {
        let grow = |bytes| context.admission.try_grow(&mut memory, to_kib(bytes));
        let decompressed = decompress(message, max_len, grow);
        memory.shrink_to(to_kib(decompressed.as_ref().map_or(0, Vec::len)));
        (decompressed, memory)
    };
    if message.len() <= MAX_INLINE_BYTES {
        let (decompressed, rest) = decompress(&message, MAX_INLINE_BYTES, memory);
        if !matches!(decompressed, Err(Error::Protocol(ProtocolError::MessageTooLarge))) {
            return Ok((decompressed, rest));
        }
        memory = rest;
    }
    // The job holds the reservation, so that calls that are cancelled meanwhile count.
    let job = move || decompress(&message, MAX_REQUEST_BYTES, memory);
    tokio::task::spawn_blocking(job).await.map_err(Error::internal)
}
