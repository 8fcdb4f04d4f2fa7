//! How much the service takes on at once: calls, and memory for their messages.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use tokio::{
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::timeout,
};
use tonic::body::Body;

use crate::{error::Error, peers::Share};

/// How long a call waits to be let in: a fraction of any deadline, so that a caller that
/// is turned away can go elsewhere.
const MAX_WAIT: Duration = Duration::from_millis(500);

/// Memory for each call that there is a place for, in KiB: for what it says, for an answer
/// that is not large, for what it costs besides, and for those that are not let in yet.
const MEMORY_PER_PLACE: usize = 48;

/// Memory for calls at the least, in KiB: a dozen of the largest requests.
const MIN_MEMORY: usize = 12 * 1024;

/// What a call costs besides its messages and its metadata, in KiB, as measured: a stream
/// of HTTP/2, a task, and the buffer in which it came.
const CALL: u32 = 20;

/// What an entry of metadata costs besides its name and its value, in bytes, as measured.
const METADATA_ENTRY: usize = 128;

/// What a stream of reflection may have in memory, in KiB, as measured: questions that are
/// not read yet, and a few answers that the caller does not read.
const REFLECTION: u32 = 160;

/// Answers of up to a MiB that are made or not sent.
const LARGE_ANSWERS: usize = 16;

/// How many of them one peer may have.
pub const LARGE_ANSWERS_PER_PEER: usize = LARGE_ANSWERS / 4 * 3;

/// From which length on an answer is a large one, in bytes: one to-do has up to 41 kB.
const LARGE: usize = 64 * 1024;

/// The largest request, in bytes. The largest good one has a description of 10 000
/// characters, 40 kB; more is read to say what is wrong with it.
pub const MAX_REQUEST_BYTES: usize = 1024 * 1024;

/// What comes before a message: whether it is compressed, and its length.
const MESSAGE_HEADER: usize = 5;

/// Lets calls in, and answers out.
#[derive(Debug)]
pub struct Admission {
    calls: Semaphore,
    queue: Semaphore,
    memory: Arc<Semaphore>,
    large_answers: Arc<Semaphore>,
}

/// Memory for one call, as long as it takes it.
#[derive(Debug)]
pub struct Room {
    /// Of what all may have, and counted in the share.
    memory: OwnedSemaphorePermit,
    /// What it takes besides its messages, in KiB.
    base: u32,
    share: Arc<Share>,
}

/// Leave to make one large answer, and to keep it until it is sent.
#[derive(Debug)]
pub struct Large {
    _of_peer: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
    _share: Arc<Share>,
}

/// A place among the calls under way.
#[derive(Debug)]
pub struct Place<'a> {
    _of_peer: SemaphorePermit<'a>,
    _of_all: SemaphorePermit<'a>,
}

/// How many calls one peer may have that are let in or wait for that: when it has all places,
/// there is still room for others to wait.
#[must_use]
pub fn calls_per_peer(max_calls: usize) -> usize {
    max_calls + max_calls.div_ceil(2)
}

/// Memory for calls that have come, in KiB.
fn memory(max_calls: usize) -> usize {
    (max_calls * MEMORY_PER_PLACE).max(MIN_MEMORY)
}

impl Admission {
    /// For `max_calls` at once, and as many that wait.
    #[must_use]
    pub fn new(max_calls: usize) -> Self {
        Self {
            calls: Semaphore::new(max_calls),
            queue: Semaphore::new(max_calls),
            memory: Arc::new(Semaphore::new(memory(max_calls))),
            large_answers: Arc::new(Semaphore::new(LARGE_ANSWERS)),
        }
    }

    /// Memory for a call that begins with these headers.
    pub fn room(&self, share: Arc<Share>, headers: &HeaderMap) -> Result<Room, Error> {
        self.room_of(CALL, share, headers)
    }

    /// Memory for a stream of reflection.
    pub fn room_of_reflection(
        &self,
        share: Arc<Share>,
        headers: &HeaderMap,
    ) -> Result<Room, Error> {
        self.room_of(CALL + REFLECTION, share, headers)
    }

    fn room_of(&self, cost: u32, share: Arc<Share>, headers: &HeaderMap) -> Result<Room, Error> {
        let base = cost + kib(size_of_metadata(headers))?;
        let memory = self.memory(&share, base).ok_or(Error::Overloaded)?;
        Ok(Room { memory, base, share })
    }

    /// Reads a request. What is too large is read in part, enough to say so.
    pub async fn read(
        &self,
        request: Request<Incoming>,
        room: &mut Room,
    ) -> Result<Request<Full<Bytes>>, Error> {
        let (parts, mut body) = request.into_parts();
        let mut message = Vec::new();
        while message.len() <= MESSAGE_HEADER + MAX_REQUEST_BYTES
            && announced(&message).is_none_or(|length| length <= MAX_REQUEST_BYTES)
            && let Some(frame) = body.frame().await
        {
            let Ok(frame) = frame else {
                // The stream is reset, and whoever waits for this call drops it.
                return std::future::pending().await;
            };
            let Some(data) = frame.data_ref() else {
                continue;
            };
            let length = message.len() + data.len();
            if length > message.capacity() {
                // Doubling, up to the end of the message; a quarter, for what comes after it.
                let whole = MESSAGE_HEADER + announced(&message).unwrap_or(0);
                let (double, quarter_more) = (2 * message.len(), message.len() / 4 * 5);
                let capacity = length.max(whole.min(double)).max(quarter_more);
                if !self.make_room(capacity, room)? {
                    return Err(Error::Overloaded);
                }
                message.reserve_exact(capacity - message.len());
            }
            // What was received lies in buffers that are far larger.
            message.extend_from_slice(data);
        }
        Ok(Request::from_parts(parts, Full::new(message.into())))
    }

    /// Leave to make an answer that may be large. Waits for it, but not long, and before
    /// there is any answer that would have to be kept meanwhile.
    pub async fn large_answer(&self, share: &Arc<Share>) -> Result<Large, Error> {
        let of_peer = share.large_answers.clone().acquire_owned();
        let of_all = self.large_answers.clone().acquire_owned();
        let both = timeout(MAX_WAIT, async { Ok((of_peer.await?, of_all.await?)) }).await;
        let both: Result<_, AcquireError> = both.map_err(|_| Error::Overloaded)?;
        let (of_peer, of_all) = both.map_err(Error::internal)?;
        Ok(Large { _of_peer: of_peer, _of_all: of_all, _share: share.clone() })
    }

    /// A place among the calls under way. Waits for one, but not long.
    pub async fn enter<'a>(&'a self, share: &'a Share) -> Result<Place<'a>, Error> {
        let of_peer = share.calls.try_acquire().map_err(|_| Error::Overloaded)?;
        if let Ok(of_all) = self.calls.try_acquire() {
            return Ok(Place { _of_peer: of_peer, _of_all: of_all });
        }
        let _queued = self.queue.try_acquire().map_err(|_| Error::Overloaded)?;
        let of_all = timeout(MAX_WAIT, self.calls.acquire()).await;
        let of_all = of_all.map_err(|_| Error::Overloaded)?.map_err(Error::internal)?;
        Ok(Place { _of_peer: of_peer, _of_all: of_all })
    }

    /// Keeps the answer to a call in memory until it is sent, and `kept` with it.
    pub async fn answer<K: Send + 'static>(
        &self,
        response: Response<Body>,
        mut room: Room,
        large: Option<Large>,
        kept: K,
    ) -> Result<Response<Body>, Error> {
        if response.body().is_end_stream() {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(Error::internal)?;
        let trailers = body.trailers().cloned().map(Ok);
        let bytes = body.to_bytes();
        room.shrink_to(bytes.len())?;
        // What is done is answered, even where there is no room: what is not large may not
        // be counted in full then.
        let is_large = bytes.len() > LARGE;
        let fits = !is_large && self.make_room(bytes.len(), &mut room)?;
        // Somebody else may make a large answer.
        let large = large.filter(|_| !fits);
        let answer = Answer { bytes, _room: room, _large: large, _kept: kept };
        let body = Full::new(Bytes::from_owner(answer)).with_trailers(async { trailers });
        Ok(Response::from_parts(parts, Body::new(body)))
    }

    /// A place among the calls of health that a peer may have.
    pub fn enter_health(&self, share: &Share) -> Result<OwnedSemaphorePermit, Error> {
        share.health_calls.clone().try_acquire_owned().map_err(|_| Error::Overloaded)
    }

    /// Makes room for a message of `length` bytes, if there is any.
    fn make_room(&self, length: usize, room: &mut Room) -> Result<bool, Error> {
        let missing = (room.base + kib(length)?).saturating_sub(room.size());
        if missing == 0 {
            return Ok(true);
        }
        let more = self.memory(&room.share, missing);
        Ok(more.map(|more| room.memory.merge(more)).is_some())
    }

    /// So many KiB of what all may have, for a peer that has no more then than it leaves: one
    /// that says only half of what it has to say, or does not read its answers, leaves some
    /// for others, and two do not have all of it.
    fn memory(&self, share: &Share, size: u32) -> Option<OwnedSemaphorePermit> {
        let has = share.take_memory(size);
        let leaves = self.memory.available_permits();
        let memory = (has <= leaves).then(|| self.memory.clone().try_acquire_many_owned(size).ok());
        let memory = memory.flatten();
        if memory.is_none() {
            share.give_memory_back(size);
        }
        memory
    }
}

/// The length that a message says it has.
fn announced(message: &[u8]) -> Option<usize> {
    let (&[_is_compressed, length @ ..], _) = message.split_first_chunk::<MESSAGE_HEADER>()?;
    usize::try_from(u32::from_be_bytes(length)).ok()
}

fn kib(bytes: usize) -> Result<u32, Error> {
    u32::try_from(bytes.div_ceil(1024)).map_err(Error::internal)
}

/// What metadata take in memory, in bytes. Names and values lie in the buffer in which they
/// came, which is up to twice as large.
fn size_of_metadata(headers: &HeaderMap) -> usize {
    let size = |(name, value): (&HeaderName, &HeaderValue)| {
        2 * (name.as_str().len() + value.len()) + METADATA_ENTRY
    };
    headers.iter().map(size).sum()
}

impl Room {
    /// In KiB.
    fn size(&self) -> u32 {
        u32::try_from(self.memory.num_permits()).unwrap_or(u32::MAX)
    }

    /// To what it takes with a message of `length` bytes, if it is larger.
    fn shrink_to(&mut self, length: usize) -> Result<(), Error> {
        let surplus = self.size().saturating_sub(self.base + kib(length)?);
        drop(self.memory.split(surplus as usize));
        self.share.give_memory_back(surplus);
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.share.give_memory_back(self.size());
    }
}

/// An answer, as long as it is in memory: in the hands of HTTP/2, too.
struct Answer<K> {
    bytes: Bytes,
    _room: Room,
    _large: Option<Large>,
    _kept: K,
}

impl<K> AsRef<[u8]> for Answer<K> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
