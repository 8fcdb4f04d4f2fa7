//! What the handler of a server stream and the layers around it share, as an extension of the
//! request.
//!
//! The messages go from the handler to the body here, and not through tonic: its encoder holds on
//! to a buffer as large as the largest message, for as long as the stream is open.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::{Message, bytes::Bytes};
use tonic::Request;

use super::{error::Error, protocol::MESSAGE_PREFIX_LEN};

/// An open stream: its next message, what it has sent, and what it sends at its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenStream(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The message that the body sends next. Encoded with its prefix.
    next: Option<Bytes>,
    /// The message that the stream ends with, if it ends with an error. Encoded with its prefix.
    last: Option<Bytes>,
    sent: Sent,
    /// The reason of the error at the end.
    reason: Option<&'static str>,
}

/// What a stream has passed on to HTTP/2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    /// Messages.
    pub(crate) messages: u64,
    /// Changes in the messages.
    pub(crate) changes: u64,
    /// The size of the messages, in bytes.
    pub(crate) bytes: u64,
}

impl OpenStream {
    /// Returns the stream of a request.
    ///
    /// # Errors
    /// [`Error::Internal`] if the method is not a server stream.
    pub(crate) fn from_request<T>(request: &Request<T>) -> Result<Self, Error> {
        let stream = request.extensions().get::<Self>().cloned();
        stream.ok_or_else(|| Error::internal("a method that is unary has no stream"))
    }

    /// Sends a message, and sets the one with which the stream ends, if it ends now. The body polls
    /// the handler again when HTTP/2 has taken the message.
    pub(crate) fn send(&self, message: &impl Message, changes: usize, last: &impl Message) {
        let (message, last) = (encode(message), encode(last));
        let mut state = self.lock();
        state.sent.changes += changes as u64;
        state.next = Some(message);
        state.last = Some(last);
    }

    /// Returns the message that the handler has sent, once, and counts it.
    pub(crate) fn take_message(&self) -> Option<Bytes> {
        let mut state = self.lock();
        let message = state.next.take()?;
        state.sent.count(&message);
        Some(message)
    }

    /// Returns the message that the stream ends with, once, and counts it.
    pub(crate) fn take_last_message(&self) -> Option<Bytes> {
        let mut state = self.lock();
        let message = state.last.take()?;
        state.sent.count(&message);
        Some(message)
    }

    /// Makes the stream end without a last message.
    pub(crate) fn clear_last_message(&self) {
        self.lock().last = None;
    }

    /// Sets the reason of the error with which the stream ends.
    pub(crate) fn set_reason(&self, error: &Error) {
        self.lock().reason = Some(error.reason());
    }

    /// Sets the reason of a stream that the client does not read.
    pub(crate) fn set_unread(&self) {
        self.lock().reason = Some("NOT_READ");
    }

    /// Returns the reason of the error with which the stream ended.
    pub(crate) fn reason(&self) -> Option<&'static str> {
        self.lock().reason
    }

    /// Returns what the stream has sent.
    pub(crate) fn sent(&self) -> Sent {
        self.lock().sent
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sent {
    fn count(&mut self, message: &Bytes) {
        self.messages += 1;
        self.bytes += (message.len() - MESSAGE_PREFIX_LEN) as u64;
    }
}

/// Encodes a message with its prefix, not compressed.
fn encode(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut bytes = Vec::with_capacity(MESSAGE_PREFIX_LEN + len);
    bytes.push(0);
    bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    message.encode_raw(&mut bytes);
    bytes.into()
}
