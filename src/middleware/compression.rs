//! Compression of messages with gzip (gRPC compression, `grpc-encoding`).
//!
//! Requests are decompressed by the middleware and not by tonic, so that the memory budget covers
//! the decompressed message, and every service has the same limits and errors. Responses are
//! compressed here, because tonic compresses all responses or none.

use std::{
    pin::Pin,
    task::{Context as TaskContext, Poll, ready},
};

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status as Step};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Bytes;
use tonic::{Status, body::Body};

use crate::{
    rpc::{
        error::Error,
        protocol::{MESSAGE_PREFIX_LEN, ProtocolError},
    },
    types::error_chain::BoxError,
};

/// The metadata entry that lists the compressions that a peer accepts.
const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

/// The metadata entry that names the compression of the messages.
pub(super) const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

/// The value of [`GRPC_ENCODING`] for gzip.
pub(super) const GZIP: HeaderValue = HeaderValue::from_static("gzip");

/// The compression flag in the prefix of a message.
const COMPRESSED: u8 = 1;

/// Window bits of gzip: 32 KiB, the maximum, which any client may use.
const WINDOW_BITS: u8 = 15;

/// The smallest response that is compressed, in bytes. A smaller one fits into the initial
/// congestion window of TCP (10 segments, RFC 6928), so that compression saves no round trip. As
/// measured, level 1 takes 10 µs of CPU per KiB and saves 33 to 48 %: it is faster than the
/// network below 0.5 Gbit/s.
///
/// Test: `large_responses_are_compressed_for_clients_that_accept_gzip`.
pub(super) const MIN_COMPRESSED_BYTES: usize = 16 * 1024;

/// How the client compresses the messages of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    Identity,
    Gzip,
}

impl Encoding {
    /// Takes the encoding from the metadata. What the routes get is not compressed.
    pub(super) fn take(headers: &mut HeaderMap) -> Result<Self, Error> {
        match headers.remove(GRPC_ENCODING).as_ref().map(HeaderValue::as_bytes) {
            None | Some(b"identity") => Ok(Self::Identity),
            Some(b"gzip") => Ok(Self::Gzip),
            Some(_) => Err(ProtocolError::UnsupportedEncoding.into()),
        }
    }
}

/// Returns `true` if the client accepts responses that are compressed with gzip.
pub(super) fn accepts_gzip(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(GRPC_ACCEPT_ENCODING).iter();
    let mut names = accepted.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    names.any(|name| name.trim_ascii() == GZIP.as_bytes())
}

/// Returns `true` if the flag in the prefix of a message says so.
pub(super) fn is_compressed(message: &[u8]) -> bool {
    message.first() == Some(&COMPRESSED)
}

/// Decompresses a message, prefix included, to at most `max_len` bytes.
///
/// `grow` reserves memory for that many bytes, and returns `false` if there is none.
///
/// # Errors
/// [`ProtocolError::MessageTooLarge`], [`ProtocolError::InvalidCompression`], or
/// [`Error::Overloaded`] if there is no memory.
pub(super) fn decompress(
    message: &[u8],
    max_len: usize,
    mut grow: impl FnMut(usize) -> bool,
) -> Result<Vec<u8>, Error> {
    let declared = declared_len(message).ok_or(ProtocolError::InvalidCompression)?;
    if declared > max_len {
        return Err(ProtocolError::MessageTooLarge.into());
    }
    let compressed = &message[MESSAGE_PREFIX_LEN..];
    if compressed.len() != declared {
        return Err(ProtocolError::InvalidCompression.into());
    }
    let mut decompressor = Decompress::new_gzip(WINDOW_BITS);
    let mut output = vec![0; MESSAGE_PREFIX_LEN];
    // One byte more than the limit shows that there is more.
    let max_capacity = MESSAGE_PREFIX_LEN + max_len + 1;
    let mut capacity = MESSAGE_PREFIX_LEN + 4 * declared;
    loop {
        capacity = capacity.min(max_capacity);
        if !grow(message.len() + capacity) {
            return Err(Error::Overloaded);
        }
        output.reserve_exact(capacity - output.len());
        let read = usize::try_from(decompressor.total_in()).unwrap_or(usize::MAX);
        let rest = compressed.get(read..).unwrap_or_default();
        let step = decompressor.decompress_vec(rest, &mut output, FlushDecompress::None);
        let step = step.map_err(|_| ProtocolError::InvalidCompression)?;
        if output.len() - MESSAGE_PREFIX_LEN > max_len {
            return Err(ProtocolError::MessageTooLarge.into());
        }
        match step {
            Step::StreamEnd if decompressor.total_in() == compressed.len() as u64 => break,
            Step::Ok | Step::BufError if output.len() == output.capacity() => {
                capacity = 2 * output.len();
            }
            // Truncated, or followed by other bytes.
            _ => return Err(ProtocolError::InvalidCompression.into()),
        }
    }
    set_prefix(&mut output, false);
    Ok(output)
}

/// Compresses a message, prefix included. Returns `None` if that saves less than an eighth.
pub(super) fn compress(message: &[u8]) -> Option<Bytes> {
    let (&[0, ..], content) = message.split_first_chunk::<MESSAGE_PREFIX_LEN>()? else {
        return None;
    };
    let mut output = Vec::with_capacity(message.len() / 8 * 7);
    output.resize(MESSAGE_PREFIX_LEN, 0);
    let mut compressor = Compress::new_gzip(Compression::fast(), WINDOW_BITS);
    let step = compressor.compress_vec(content, &mut output, FlushCompress::Finish);
    if !matches!(step, Ok(Step::StreamEnd)) {
        return None;
    }
    set_prefix(&mut output, true);
    Some(output.into())
}

/// Returns the length that the prefix of a message declares.
pub(super) fn declared_len(message: &[u8]) -> Option<usize> {
    let (&[_is_compressed, len @ ..], _) = message.split_first_chunk::<MESSAGE_PREFIX_LEN>()?;
    usize::try_from(u32::from_be_bytes(len)).ok()
}

/// Writes the prefix of a message: the compression flag and the length.
fn set_prefix(message: &mut [u8], is_compressed: bool) {
    let len = u32::try_from(message.len() - MESSAGE_PREFIX_LEN).unwrap_or(u32::MAX);
    message[0] = is_compressed.into();
    message[1..MESSAGE_PREFIX_LEN].copy_from_slice(&len.to_be_bytes());
}

/// Returns a request body that fails with this error when a handler reads it.
pub(super) fn failed_body(error: Error) -> Body {
    Body::new(Decompressed::<Body> {
        inner: Body::empty(),
        max_len: 0,
        received: Vec::new(),
        error: Some(error),
    })
}

/// The body of a request stream, whose messages it decompresses one by one.
pub(super) struct Decompressed<B> {
    inner: B,
    /// The limit of each message, in bytes.
    max_len: usize,
    /// What has arrived of the next message.
    received: Vec<u8>,
    error: Option<Error>,
}

impl<B> Decompressed<B> {
    pub(super) fn new(inner: B, max_len: usize) -> Self {
        Self { inner, max_len, received: Vec::new(), error: None }
    }

    /// Takes the next message, decompressed, if all of it has arrived.
    fn next_message(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(len) = declared_len(&self.received) else {
            return Ok(None);
        };
        if len > self.max_len {
            return Err(ProtocolError::MessageTooLarge.into());
        }
        let end = MESSAGE_PREFIX_LEN + len;
        if self.received.len() < end {
            return Ok(None);
        }
        let rest = self.received.split_off(end);
        let message = std::mem::replace(&mut self.received, rest);
        if !is_compressed(&message) {
            return Ok(Some(message.into()));
        }
        decompress(&message, self.max_len, |_| true).map(|message| Some(message.into()))
    }
}

impl<B> HttpBody for Decompressed<B>
where
    B: HttpBody<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let error = loop {
            if let Some(error) = this.error.take() {
                break error;
            }
            match this.next_message() {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(Frame::data(message)))),
                Ok(None) => {}
                Err(error) => break error,
            }
            match ready!(Pin::new(&mut this.inner).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.received.extend_from_slice(&data),
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None if this.received.is_empty() => return Poll::Ready(None),
                None => break ProtocolError::Truncated.into(),
            }
        };
        this.received = Vec::new();
        Poll::Ready(Some(Err(Status::from(error).into())))
    }

    fn is_end_stream(&self) -> bool {
        self.error.is_none() && self.received.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(content: &[u8]) -> Vec<u8> {
        let mut message = [&[0; MESSAGE_PREFIX_LEN], content].concat();
        set_prefix(&mut message, false);
        message
    }

    #[test]
    fn a_bomb_is_too_large_and_never_decompressed_whole() {
        let bomb = compress(&message(&vec![0; 64 * 1024 * 1024])).expect("smaller");
        let mut most = 0;
        let rejected = decompress(&bomb, 1024 * 1024, |bytes| {
            most = most.max(bytes);
            true
        });
        assert!(
            matches!(rejected, Err(Error::Protocol(ProtocolError::MessageTooLarge))),
            "{rejected:?}"
        );
        assert!(most < 2 * 1024 * 1024, "{most} bytes");
    }

    #[test]
    fn a_message_that_the_budget_does_not_allow_is_shed() {
        let small = compress(&message(&vec![0; 100_000])).expect("smaller");
        let rejected = decompress(&small, 1024 * 1024, |bytes| bytes < 50_000);
        assert!(matches!(rejected, Err(Error::Overloaded)), "{rejected:?}");
    }

    #[test]
    fn truncated_and_trailing_bytes_are_invalid() {
        let whole = compress(&message(&[7; 10_000])).expect("smaller").to_vec();
        let content = &whole[MESSAGE_PREFIX_LEN..];
        for bad in [&content[..content.len() - 1], &content[..3], b"", &[content, b"x"].concat()] {
            let mut bad = message(bad);
            set_prefix(&mut bad, true);
            let rejected = decompress(&bad, 1024 * 1024, |_| true);
            assert!(
                matches!(rejected, Err(Error::Protocol(ProtocolError::InvalidCompression))),
                "{rejected:?}"
            );
        }
    }

    #[test]
    fn gzip_is_one_of_the_accepted_encodings() {
        let accepts = |value: &str| {
            let value = HeaderValue::from_str(value).expect("a header");
            accepts_gzip(&HeaderMap::from_iter([(GRPC_ACCEPT_ENCODING, value)]))
        };
        for yes in ["gzip", "identity,deflate,gzip", "identity, gzip , br"] {
            assert!(accepts(yes), "{yes}");
        }
        for no in ["", "identity", "x-gzip", "gzipped", "GZIP"] {
            assert!(!accepts(no), "{no}");
        }
        assert!(!accepts_gzip(&HeaderMap::new()));
    }

    proptest! {
        #[test]
        fn what_is_compressed_can_be_decompressed(
            unit in prop::collection::vec(any::<u8>(), 1..50), count in 1_usize..4_000
        ) {
            let whole = message(&unit.repeat(count));
            if let Some(compressed) = compress(&whole) {
                prop_assert!(compressed.len() < whole.len());
                let result = decompress(&compressed, whole.len(), |_| true);
                prop_assert_eq!(result.expect("valid"), whole);
            }
        }

        #[test]
        fn any_bytes_are_decompressed_or_rejected(
            content in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut bytes = message(&content);
            set_prefix(&mut bytes, true);
            let _ = decompress(&bytes, 1024, |_| true);
        }
    }
}
