//! The cardinality of a request that is not buffered: its method takes one message.

use std::{
    pin::Pin,
    task::{Context as TaskContext, Poll, ready},
};

use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Bytes;
use tonic::Status;

use super::compression::declared_len;
use crate::{
    rpc::{
        error::Error,
        protocol::{MESSAGE_PREFIX_LEN, ProtocolError},
    },
    types::error_chain::BoxError,
};

/// The body of a request that fails if it has no message, or bytes after the first message.
pub(super) struct SingleMessage<B> {
    inner: B,
    prefix: Vec<u8>,
    /// The bytes that have arrived.
    received: usize,
}

impl<B> SingleMessage<B> {
    pub(super) fn new(inner: B) -> Self {
        Self { inner, prefix: Vec::with_capacity(MESSAGE_PREFIX_LEN), received: 0 }
    }

    /// Returns `true` if the message does not end before the end of this data.
    fn admits(&mut self, data: &[u8]) -> bool {
        let missing = MESSAGE_PREFIX_LEN - self.prefix.len();
        self.prefix.extend_from_slice(&data[..missing.min(data.len())]);
        self.received = self.received.saturating_add(data.len());
        let len = declared_len(&self.prefix).unwrap_or(usize::MAX - MESSAGE_PREFIX_LEN);
        self.received <= MESSAGE_PREFIX_LEN + len
    }
}

impl<B> HttpBody for SingleMessage<B>
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
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(context));
        let is_valid = match &frame {
            Some(Ok(frame)) => frame.data_ref().is_none_or(|data| this.admits(data)),
            Some(Err(_)) => true,
            None => this.received > 0,
        };
        Poll::Ready(if is_valid {
            frame.map(|frame| frame.map_err(Into::into))
        } else {
            // Reported once.
            this.received = 1;
            let error = Error::from(ProtocolError::NotOneMessage);
            Some(Err(Status::from(error).into()))
        })
    }

    fn is_end_stream(&self) -> bool {
        self.received > 0 && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
