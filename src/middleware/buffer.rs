//! Buffers requests and responses within the memory budget.

use http::Response;
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use tonic::{Code, Status, body::Body};

use super::call::Call;
use crate::{
    limits::{
        MAX_REQUEST_BYTES,
        admission::{Admission, LargeResponsePermit, MemoryReservation},
    },
    rpc::error::{self, Error},
};

/// The size from which on a response is large, in bytes. A todo has up to 41 KB.
///
/// Test: `a_client_that_reads_nothing_leaves_memory_for_others`.
const LARGE_RESPONSE_BYTES: usize = 64 * 1024;

/// The prefix of a length-prefixed message (gRPC over HTTP/2): a compression flag and the length.
const MESSAGE_PREFIX_LEN: usize = 5;

/// Reads a request. Of a message that is too large, it reads as much as the error needs.
pub(super) async fn buffer_request(
    call: Call,
    admission: &Admission,
    memory: &mut MemoryReservation,
) -> Result<Call<Full<Bytes>>, Error> {
    let mut message = Vec::new();
    let mut call = call;
    while message.len() <= MESSAGE_PREFIX_LEN + MAX_REQUEST_BYTES
        && declared_len(&message).is_none_or(|len| len <= MAX_REQUEST_BYTES)
        && let Some(frame) = call.request.body_mut().frame().await
    {
        let Ok(frame) = frame else {
            // The client has reset the stream, and hyper drops this future.
            return std::future::pending().await;
        };
        let Some(data) = frame.data_ref() else {
            continue;
        };
        let len = message.len() + data.len();
        if len > message.capacity() {
            // Doubles up to the end of the message, and then grows by a quarter, for what a
            // client sends after it.
            let whole = MESSAGE_PREFIX_LEN + declared_len(&message).unwrap_or(0);
            let (double, quarter_more) = (2 * message.len(), message.len() / 4 * 5);
            let capacity = len.max(whole.min(double)).max(quarter_more);
            if !admission.try_grow(memory, to_kib(capacity)) {
                return Err(Error::Overloaded);
            }
            message.reserve_exact(capacity - message.len());
        }
        // Copied, because the buffers of received frames are far larger than the frames.
        message.extend_from_slice(data);
    }
    Ok(call.map_body(|_| Full::new(message.into())))
}

/// Buffers a response, and holds its memory and the guards until HTTP/2 has sent it.
pub(super) async fn buffer_response<G: Send + 'static>(
    response: Response<Body>,
    admission: &Admission,
    mut memory: MemoryReservation,
    large: Option<LargeResponsePermit>,
    guards: G,
) -> Result<Response<Body>, Error> {
    if response.body().is_end_stream() {
        return Ok(response);
    }
    let (parts, body) = response.into_parts();
    let body = body.collect().await.map_err(Error::internal)?;
    let trailers = body.trailers().cloned();
    // A message that cannot be encoded ends in the trailers.
    if let Some(trailers) = &trailers
        && error::status_code(trailers) != Some(Code::Ok)
        && let Some(status) = Status::from_header_map(trailers)
    {
        return Ok(status.into_http());
    }
    let bytes = body.to_bytes();
    memory.shrink_to(to_kib(bytes.len()));
    // Work that is done is returned, even beyond the budget: a response that is not large may
    // then exceed its reservation.
    let is_large = bytes.len() > LARGE_RESPONSE_BYTES;
    let fits = !is_large && admission.try_grow(&mut memory, to_kib(bytes.len()));
    // A response that fits frees its permit for another call.
    let large = large.filter(|_| !fits);
    let bytes = hold_until_sent(bytes, (memory, large, guards));
    let trailers = trailers.map(Ok);
    let body = Full::new(bytes).with_trailers(async { trailers });
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// Returns the length that the prefix of a message declares.
fn declared_len(message: &[u8]) -> Option<usize> {
    let (&[_is_compressed, len @ ..], _) = message.split_first_chunk::<MESSAGE_PREFIX_LEN>()?;
    usize::try_from(u32::from_be_bytes(len)).ok()
}

/// Rounds up to KiB.
pub(super) fn to_kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// Returns bytes that hold the guards until HTTP/2 has sent them.
pub(super) fn hold_until_sent(bytes: Bytes, guards: impl Send + 'static) -> Bytes {
    Bytes::from_owner(HeldBytes { bytes, _guards: guards })
}

struct HeldBytes<G> {
    bytes: Bytes,
    _guards: G,
}

impl<G> AsRef<[u8]> for HeldBytes<G> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
