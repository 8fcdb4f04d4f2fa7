//! What the handler of a server stream and the layers around it share, as an extension of the
//! request.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use prost::{Message, bytes::Bytes};
use tonic::Request;

use super::{error::Error, protocol::MESSAGE_PREFIX_LEN};

/// An open stream: what it has sent, and what it sends at its end. A handler that does not use it
/// has no last message.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenStream(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Whether the handler counts what it sends.
    is_counted: AtomicBool,
    messages: AtomicU64,
    changes: AtomicU64,
    bytes: AtomicU64,
    /// The message that the stream ends with, if a layer ends it. Encoded with its prefix.
    last_message: Mutex<Option<Bytes>>,
    /// The reason of the error at the end.
    reason: Mutex<Option<&'static str>>,
}

/// What a stream has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

    /// Counts a message, and sets the one with which the stream ends, if it ends now.
    pub(crate) fn record(&self, message: &impl Message, changes: usize, last: &impl Message) {
        self.0.is_counted.store(true, Ordering::Relaxed);
        self.0.changes.fetch_add(changes as u64, Ordering::Relaxed);
        self.count(message.encoded_len());
        *lock(&self.0.last_message) = Some(encode(last));
    }

    /// Returns the message that the stream ends with, once, and counts it.
    pub(crate) fn take_last_message(&self) -> Option<Bytes> {
        let message = lock(&self.0.last_message).take()?;
        self.count(message.len() - MESSAGE_PREFIX_LEN);
        Some(message)
    }

    /// Makes the stream end without a last message.
    pub(crate) fn clear_last_message(&self) {
        *lock(&self.0.last_message) = None;
    }

    /// Sets the reason of the error with which the stream ends.
    pub(crate) fn set_reason(&self, error: &Error) {
        *lock(&self.0.reason) = Some(error.reason());
    }

    /// Sets the reason of a stream that the client does not read.
    pub(crate) fn set_unread(&self) {
        *lock(&self.0.reason) = Some("NOT_READ");
    }

    /// Returns the reason of the error with which the stream ended.
    pub(crate) fn reason(&self) -> Option<&'static str> {
        *lock(&self.0.reason)
    }

    /// Returns what the stream has sent, if its handler counts.
    pub(crate) fn sent(&self) -> Option<Sent> {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        self.0.is_counted.load(Ordering::Relaxed).then(|| Sent {
            messages: load(&self.0.messages),
            changes: load(&self.0.changes),
            bytes: load(&self.0.bytes),
        })
    }

    fn count(&self, bytes: usize) {
        self.0.messages.fetch_add(1, Ordering::Relaxed);
        self.0.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Encodes a message with its prefix, not compressed.
fn encode(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut bytes = Vec::with_capacity(MESSAGE_PREFIX_LEN + len);
    bytes.push(0);
    bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(message.encode_to_vec());
    bytes.into()
}
