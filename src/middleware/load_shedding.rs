//! Load shedding: what a call needs before work starts for it. A call that cannot get it is
//! shed with RESOURCE_EXHAUSTED.
//!
//! - A unary call of the API reserves memory when its headers arrive, is read whole, and then
//!   acquires a call permit, and before it a permit for a large response if its method may
//!   return one. Its response is buffered.
//! - A stream of the API reserves memory and is read like a unary call, and then acquires a
//!   stream permit. The permit stands for the memory of the open stream.
//! - A call of the health service acquires a permit of the client only: load never fails a
//!   probe.
//! - A reflection stream acquires a permit of its own kind, and memory for what it may buffer.

use std::{
    future::{Ready, ready},
    task::{Context as TaskContext, Poll},
};

use http::{HeaderMap, HeaderName, HeaderValue, Response};
use http_body_util::Either as EitherBody;
use tokio_util::either::Either;
use tonic::body::Body;
use tower::Service;

use super::{
    ResponseFuture,
    buffer::{RequestBody, ResponseGuards, buffer_request, buffer_response, to_kib},
    call::{Call, StreamGuards},
    compression::{Decompressed, Encoding, accepts_gzip},
    single_message::SingleMessage,
};
use crate::{
    limits::{
        MAX_SYSTEM_REQUEST_BYTES,
        admission::{Admission, MemoryReservation},
    },
    rpc::{error::Error, policy::System},
};

/// What a call costs besides its messages and metadata, in KiB, as measured: an HTTP/2 stream, a
/// task, and the buffer of its headers.
///
/// Test: `metadata_reserves_memory_as_messages_do`.
const CALL_OVERHEAD_KIB: u32 = 20;

/// What a reflection stream may buffer, in KiB, as measured: requests that are not read yet, and
/// a few responses that the client does not read.
///
/// Test: `reflection_streams_take_memory_for_what_they_buffer`.
const REFLECTION_STREAM_KIB: u32 = 160;

/// What an entry of metadata costs besides its name and value, in bytes, as measured.
///
/// Test: `metadata_reserves_memory_as_messages_do`.
const METADATA_ENTRY_OVERHEAD_BYTES: usize = 128;

#[derive(Clone, Debug)]
pub(super) struct LoadShedding<S> {
    inner: S,
}

impl<S> LoadShedding<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

/// What a call acquires before its body is read.
enum Admitted {
    /// A call of the API.
    Api(MemoryReservation),
    /// A call of a system service.
    System(StreamGuards),
}

fn pre_admit(call: &mut Call) -> Result<Admitted, Error> {
    let admission = &call.context.admission;
    let headers = || to_kib(metadata_bytes(call.request.headers()));
    Ok(match call.method.and_then(|method| method.system) {
        None => Admitted::Api(admission.reserve(&call.quota, CALL_OVERHEAD_KIB + headers())?),
        Some(System::Health) => Admitted::System(StreamGuards {
            _permit: Admission::acquire_health(&call.quota)?,
            _memory: None,
            _in_flight: call.in_flight.take(),
        }),
        Some(System::Reflection) => {
            let overhead = CALL_OVERHEAD_KIB + REFLECTION_STREAM_KIB + headers();
            let memory = admission.reserve(&call.quota, overhead)?;
            Admitted::System(StreamGuards {
                _permit: admission.acquire_reflection(&call.quota)?,
                _memory: Some(memory),
                _in_flight: call.in_flight.take(),
            })
        }
    })
}

impl<S> Service<Call> for LoadShedding<S>
where
    S: Service<Call<RequestBody>, Response = Response<Body>, Error = Error>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<ResponseFuture, Either<S::Future, Ready<Result<Response<Body>, Error>>>>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut call: Call) -> Self::Future {
        let encoding = Encoding::take(call.request.headers_mut());
        match (pre_admit(&mut call), encoding) {
            (Ok(Admitted::Api(memory)), encoding) => {
                Either::Left(Box::pin(handle_api(self.inner.clone(), call, encoding, memory)))
            }
            (Ok(Admitted::System(guards)), Ok(encoding)) => {
                call.stream_guards = Some(guards);
                let system = call.method.and_then(|method| method.system);
                let call = call.map_body(|body| {
                    let body = match system {
                        Some(System::Health) => Body::new(SingleMessage::new(body)),
                        _ => Body::new(body),
                    };
                    EitherBody::Right(match encoding {
                        Encoding::Identity => body,
                        Encoding::Gzip => {
                            Body::new(Decompressed::new(body, MAX_SYSTEM_REQUEST_BYTES))
                        }
                    })
                });
                Either::Right(Either::Left(self.inner.call(call)))
            }
            (Err(error), _) | (Ok(Admitted::System(_)), Err(error)) => {
                Either::Right(Either::Right(ready(Err(error))))
            }
        }
    }
}

async fn handle_api<S>(
    mut inner: S,
    call: Call,
    encoding: Result<Encoding, Error>,
    mut memory: MemoryReservation,
) -> Result<Response<Body>, Error>
where
    S: Service<Call<RequestBody>, Response = Response<Body>, Error = Error>,
{
    let context = call.context.clone();
    let admission = &context.admission;
    let method = call.method.ok_or(Error::Unimplemented)?;
    // Read the whole request before acquiring a permit, so that slow senders do not occupy
    // permits.
    let mut call = buffer_request(call, encoding, admission, &mut memory).await?;
    let (quota, in_flight) = (call.quota.clone(), call.in_flight.take());
    if method.server_streaming {
        let permit = admission.acquire_stream(&quota)?;
        let guards = StreamGuards { _permit: permit, _memory: None, _in_flight: in_flight };
        call.stream_guards = Some(guards);
        let response = inner.call(call).await;
        // The handler has read the request. Open streams leave the budget to other calls.
        drop(memory);
        return response;
    }
    let large = if method.large_response {
        Some(admission.acquire_large_response(&quota).await?)
    } else {
        None
    };
    let permit = admission.acquire_call(&quota).await?;
    let connection = call.connection.clone();
    let accepts_gzip = accepts_gzip(call.request.headers());
    let response = inner.call(call).await?;
    drop(permit);
    // The client may take its time to read the response from here on.
    let held = (connection.track_write(), in_flight);
    let guards = ResponseGuards { memory, large, held };
    buffer_response(response, admission, accepts_gzip, guards).await
}

/// Returns what metadata takes in memory, in bytes. Names and values share the buffer in which
/// they arrived, which is up to twice as large.
fn metadata_bytes(headers: &HeaderMap) -> usize {
    let size = |(name, value): (&HeaderName, &HeaderValue)| {
        2 * (name.as_str().len() + value.len()) + METADATA_ENTRY_OVERHEAD_BYTES
    };
    headers.iter().map(size).sum()
}
