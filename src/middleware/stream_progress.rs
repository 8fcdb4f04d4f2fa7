//! How far a client has read a stream of the API.
//!
//! A stream is sent in chunks. HTTP/2 takes the next one when the flow-control window has space for
//! a part of it, and holds it until the window has space for the rest. So at most one chunk of a
//! stream is outside of the stream's own memory, and one that stays unsent means that the window is
//! shut. The size of the chunks follows the speed of the client: the slowest has small ones, each of
//! which is progress, and a fast one has few.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use hyper::body::Bytes;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::buffer::hold_until_sent;
use crate::transport::stall::RESPONSE_READ_TIMEOUT;

/// The size of the first chunk, in bytes: a client that reads a byte a second makes progress within
/// [`SHUT_WINDOW_TIMEOUT`].
///
/// Test: `readers_of_one_byte_a_second_cost_one_page_each`.
const MIN_CHUNK_BYTES: usize = 32;

/// The maximum size of a chunk, in bytes.
///
/// Test: `a_slow_client_of_a_watch_costs_one_page`.
const MAX_CHUNK_BYTES: usize = 4 * 1024;

/// The time below which a chunk is sent fast: the next one is twice as large.
///
/// Test: `chunks_grow_while_the_client_reads_fast`.
const FAST_CHUNK: Duration = Duration::from_secs(1);

/// The time beyond which a chunk is sent slowly: the next one has the minimum size.
///
/// Test: `chunks_grow_while_the_client_reads_fast`.
const SLOW_CHUNK: Duration = Duration::from_secs(10);

/// How long the flow-control window of a stream may be shut while a message waits.
///
/// Test: `a_stream_whose_window_stays_shut_is_reset_alone`.
const SHUT_WINDOW_TIMEOUT: Duration = Duration::from_mins(1);

/// The chunks of a stream that are not sent yet.
#[derive(Debug)]
pub(super) struct Progress {
    state: Mutex<State>,
    /// Notified when a timeout starts.
    started: Notify,
}

#[derive(Debug)]
struct State {
    unsent: usize,
    /// The size of the next chunk.
    chunk_bytes: usize,
    /// The last progress.
    since: Instant,
    /// Whether the stream has ended, and the client has to read what is left.
    has_ended: bool,
    /// Waits until everything is sent.
    waker: Option<Waker>,
}

impl Progress {
    pub(super) fn new() -> Arc<Self> {
        let state = State {
            unsent: 0,
            chunk_bytes: MIN_CHUNK_BYTES,
            since: Instant::now(),
            has_ended: false,
            waker: None,
        };
        Arc::new(Self { state: Mutex::new(state), started: Notify::new() })
    }

    /// Takes the next chunk of a message. `held` lives until the chunk is sent.
    pub(super) fn next_chunk(
        self: &Arc<Self>,
        message: &mut Bytes,
        held: impl Send + 'static,
    ) -> Bytes {
        let mut state = self.lock();
        let chunk = message.split_to(message.len().min(state.chunk_bytes));
        state.unsent += 1;
        if state.unsent == 1 {
            state.since = Instant::now();
            self.started.notify_one();
        }
        drop(state);
        hold_until_sent(chunk, (Unsent(self.clone()), held))
    }

    /// Waits until the next chunk may follow. While the speed of the client is unknown, that is when
    /// the one before is sent: otherwise HTTP/2 would take thousands of small ones at once.
    pub(super) fn poll_ready(&self, context: &mut Context<'_>) -> Poll<()> {
        if self.lock().chunk_bytes == MAX_CHUNK_BYTES {
            return Poll::Ready(());
        }
        self.poll_sent(context)
    }

    /// Waits until everything is sent. So the end of the stream, which needs no window, follows
    /// nothing that the client has not read.
    pub(super) fn poll_sent(&self, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.unsent == 0 {
            return Poll::Ready(());
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }

    /// Ends the stream: from now on, the client has as long as for any response.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.has_ended = true;
        state.since = Instant::now();
        self.started.notify_one();
    }

    /// Waits until the client has read nothing for too long.
    pub(super) async fn stalled(&self) {
        loop {
            let deadline = self.lock().deadline();
            match deadline {
                Some(deadline) if deadline <= Instant::now() => return,
                Some(deadline) => tokio::select! {
                    () = sleep_until(deadline) => {}
                    () = self.started.notified() => {}
                },
                None => self.started.notified().await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Adapts the size of the next chunk to how long one took.
    fn adapt_chunk_size(&mut self, took: Duration) {
        if took < FAST_CHUNK {
            self.chunk_bytes = (self.chunk_bytes * 2).min(MAX_CHUNK_BYTES);
        } else if took > SLOW_CHUNK {
            self.chunk_bytes = MIN_CHUNK_BYTES;
        }
    }

    fn deadline(&self) -> Option<Instant> {
        if self.has_ended {
            return Some(self.since + RESPONSE_READ_TIMEOUT);
        }
        (self.unsent > 0).then(|| self.since + SHUT_WINDOW_TIMEOUT)
    }
}

/// A chunk that is not sent yet.
struct Unsent(Arc<Progress>);

impl Drop for Unsent {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.unsent -= 1;
        let took = state.since.elapsed();
        state.adapt_chunk_size(took);
        state.since = Instant::now();
        let waker = if state.unsent == 0 { state.waker.take() } else { None };
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_stalls_after_a_minute_without_progress() {
        let progress = Progress::new();
        let mut message = Bytes::from(vec![0; 5_000]);
        let hour = Duration::from_hours(1);
        assert!(timeout(hour, progress.stalled()).await.is_err(), "nothing is unsent");
        let first = progress.next_chunk(&mut message, ());
        assert_eq!((first.len(), message.len()), (32, 4_968));
        assert!(timeout(SHUT_WINDOW_TIMEOUT / 2, progress.stalled()).await.is_err());
        let second = progress.next_chunk(&mut message, ());
        drop(first);
        let started = Instant::now();
        progress.stalled().await;
        assert_eq!(started.elapsed(), SHUT_WINDOW_TIMEOUT);
        drop(second);
        assert!(timeout(hour, progress.stalled()).await.is_err(), "everything is sent");
        progress.end();
        let started = Instant::now();
        progress.stalled().await;
        assert_eq!(started.elapsed(), RESPONSE_READ_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn chunks_grow_while_the_client_reads_fast() {
        let progress = Progress::new();
        let mut message = Bytes::from(vec![0; 100_000]);
        let mut sizes = Vec::new();
        for seconds in [0, 0, 0, 0, 0, 0, 0, 0, 5, 11, 5, 0] {
            let chunk = progress.next_chunk(&mut message, ());
            sizes.push(chunk.len());
            let ready = poll_fn(|context| Poll::Ready(progress.poll_ready(context).is_ready()));
            assert_eq!(ready.await, chunk.len() == MAX_CHUNK_BYTES, "one small chunk at a time");
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
        let full = [32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 4_096, 4_096, 32, 32];
        assert_eq!(sizes, full);
    }
}
