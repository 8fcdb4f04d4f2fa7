//! Buffers requests and responses within the memory budget.

use http::Response;
use http_body::Body as _;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::Bytes;
use tonic::{Code, Status, body::Body};

use super::{
    call::Call,
    compression::{
        Encoding, GRPC_ENCODING, GZIP, MIN_COMPRESSED_BYTES, compress, declared_len, failed_body,
        is_compressed,
    },
};
use crate::{
    limits::{
        MAX_REQUEST_BYTES,
        admission::{Admission, LargeResponsePermit, MemoryReservation},
    },
    rpc::{
        error::Error,
        protocol::{MESSAGE_PREFIX_LEN, ProtocolError},
        status::status_code,
    },
};

/// The size from which on a response is large, in bytes. A todo has up to 41 KB.
///
/// Test: `a_client_that_reads_nothing_leaves_memory_for_others`.
const LARGE_RESPONSE_BYTES: usize = 64 * 1024;

/// The memory of a compressor besides its output, in KiB.
///
/// Test: `a_response_is_compressed_if_the_budget_allows_it`.
const COMPRESSOR_KIB: u32 = 272;

/// The body of a request that is buffered, or of a request stream.
pub(super) type RequestBody = Either<Full<Bytes>, Body>;

/// Reads a request. Of a message that is too large, it reads as much as the error needs.
pub(super) async fn buffer_request(
    call: Call,
    encoding: Result<Encoding, Error>,
    admission: &Admission,
    memory: &mut MemoryReservation,
) -> Result<Call<RequestBody>, Error> {
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
    let body = match encoding {
        // The handler gets the error, because authentication comes before it.
        Ok(_) if !is_single(&message) => {
            Either::Right(failed_body(ProtocolError::NotOneMessage.into()))
        }
        Err(error) => Either::Right(failed_body(error)),
        Ok(Encoding::Gzip) if is_compressed(&message) => {
            call.compressed = Some(message);
            Either::Right(Body::empty())
        }
        Ok(_) => Either::Left(Full::new(message.into())),
    };
    Ok(call.map_body(|_| body))
}

/// Returns `false` if a request has no message, or another one after the first. Truncated and
/// too large messages have errors of their own.
fn is_single(request: &[u8]) -> bool {
    let len = declared_len(request).filter(|len| *len <= MAX_REQUEST_BYTES);
    !request.is_empty() && len.is_none_or(|len| request.len() <= MESSAGE_PREFIX_LEN + len)
}

/// What the buffer of a response holds besides the response.
pub(super) struct ResponseGuards<G> {
    pub(super) memory: MemoryReservation,
    pub(super) large: Option<LargeResponsePermit>,
    /// What else is held until the response is sent.
    pub(super) held: G,
}

/// Buffers a response, compresses it if the client accepts that and it is large enough, and holds
/// its memory and the guards until HTTP/2 has sent it.
pub(super) async fn buffer_response<G: Send + 'static>(
    response: Response<Body>,
    admission: &Admission,
    accepts_gzip: bool,
    mut guards: ResponseGuards<G>,
) -> Result<Response<Body>, Error> {
    if response.body().is_end_stream() {
        return Ok(response);
    }
    let (mut parts, body) = response.into_parts();
    let body = body.collect().await.map_err(Error::internal)?;
    let trailers = body.trailers().cloned();
    // A message that cannot be encoded ends in the trailers.
    if let Some(trailers) = &trailers
        && status_code(trailers) != Some(Code::Ok)
        && let Some(status) = Status::from_header_map(trailers)
    {
        return Ok(status.into_http());
    }
    let mut bytes = body.to_bytes();
    if accepts_gzip && bytes.len() >= MIN_COMPRESSED_BYTES {
        let is_compressed;
        (bytes, guards, is_compressed) = try_compress(bytes, admission, guards).await?;
        if is_compressed {
            parts.headers.insert(GRPC_ENCODING, GZIP);
        }
    }
    let ResponseGuards { mut memory, large, held } = guards;
    memory.shrink_to(to_kib(bytes.len()));
    // Work that is done is returned, even beyond the budget: a response that is not large may
    // then exceed its reservation.
    let is_large = bytes.len() > LARGE_RESPONSE_BYTES;
    let fits = !is_large && admission.try_grow(&mut memory, to_kib(bytes.len()));
    // A response that fits frees its permit for another call.
    let large = large.filter(|_| !fits);
    let bytes = hold_until_sent(bytes, (memory, large, held));
    let trailers = trailers.map(Ok);
    let body = Full::new(bytes).with_trailers(async { trailers });
    Ok(Response::from_parts(parts, Body::new(body)))
}

/// Compresses a response if the budget has memory for it. Returns whether it is compressed.
async fn try_compress<G: Send + 'static>(
    bytes: Bytes,
    admission: &Admission,
    mut guards: ResponseGuards<G>,
) -> Result<(Bytes, ResponseGuards<G>, bool), Error> {
    if !admission.try_grow(&mut guards.memory, 2 * to_kib(bytes.len()) + COMPRESSOR_KIB) {
        return Ok((bytes, guards, false));
    }
    // The job holds the guards, so that calls that are cancelled meanwhile count.
    let is_large = bytes.len() > LARGE_RESPONSE_BYTES;
    let compression = move || {
        let compressed = compress(&bytes);
        let is_compressed = compressed.is_some();
        (compressed.unwrap_or(bytes), guards, is_compressed)
    };
    if !is_large {
        return Ok(compression());
    }
    // Milliseconds, which would delay the other calls of this thread.
    tokio::task::spawn_blocking(compression).await.map_err(Error::internal)
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

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::limits::{admission::client_limits, client_quota::ClientQuotas};

    #[tokio::test]
    async fn a_response_is_compressed_if_the_budget_allows_it() {
        let (admission, quotas) = (Admission::new(1, 1), ClientQuotas::new(client_limits(1, 1, 1)));
        let quota = |client| quotas.get(Ipv4Addr::from_bits(client).into());
        for len in [20_000, 200_000] {
            let mut message = vec![0; len];
            let content_len = u32::try_from(len - MESSAGE_PREFIX_LEN).expect("small");
            message[1..MESSAGE_PREFIX_LEN].copy_from_slice(&content_len.to_be_bytes());
            let message = Bytes::from(message);
            // Two messages fit, and not the compressor.
            for (free_kib, expected) in [(2 * to_kib(len) + 300, true), (2 * to_kib(len), false)] {
                let memory = admission.reserve(&quota(1), 1).expect("memory");
                let held: Vec<_> = (2..)
                    .map_while(|client| {
                        let free = admission.free_memory_kib().checked_sub(free_kib)?;
                        let kib = free.min(1_024);
                        (kib > 0).then(|| admission.reserve(&quota(client), kib).expect("memory"))
                    })
                    .collect();
                let guards = ResponseGuards { memory, large: None, held: () };
                let result = try_compress(message.clone(), &admission, guards).await;
                let (bytes, _guards, is_compressed) = result.expect("no panic");
                assert_eq!(is_compressed, expected, "{len} bytes, {free_kib} KiB free");
                assert_eq!(bytes.len() < len, expected);
                drop(held);
            }
        }
    }
}
