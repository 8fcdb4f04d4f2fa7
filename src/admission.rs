//! How much the service takes on at once: calls, and memory for their messages.

use std::{sync::Arc, time::Duration};

use http::{Request, Response};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use tokio::{
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::timeout,
};
use tonic::body::Body;

use crate::{call::Sending, error::Error, metrics::Counter, peers::Share};

/// How long a call waits to be let in: a fraction of any deadline, so that a caller that
/// is turned away can go elsewhere.
const MAX_WAIT: Duration = Duration::from_millis(500);

/// Memory for requests that are read and answers that are not sent, in KiB: some dozens of
/// the largest.
const MEMORY: usize = 24 * 1024;

/// What one peer may have of it: one that does not read its answers leaves some for others.
pub const MEMORY_PER_PEER: usize = MEMORY / 4 * 3;

/// What a call takes of it at the least, in KiB: all that most calls need, and some of what
/// a call costs besides its messages.
const SMALL: u32 = 4;

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
    shed: Counter,
}

/// Memory for the messages of one call, as long as they take it.
#[derive(Debug)]
pub struct Room {
    of_peer: OwnedSemaphorePermit,
    of_all: OwnedSemaphorePermit,
    share: Arc<Share>,
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

impl Admission {
    /// For `max_calls` at once, and as many that wait. Counts in `shed` what is turned away.
    #[must_use]
    pub fn new(max_calls: usize, shed: Counter) -> Self {
        Self {
            calls: Semaphore::new(max_calls),
            queue: Semaphore::new(max_calls),
            memory: Arc::new(Semaphore::new(MEMORY)),
            shed,
        }
    }

    /// Memory for a call that begins.
    pub fn room(&self, share: Arc<Share>) -> Result<Room, Error> {
        let of_peer = share.memory.clone().try_acquire_many_owned(SMALL);
        let of_all = self.memory.clone().try_acquire_many_owned(SMALL);
        match (of_peer, of_all) {
            (Ok(of_peer), Ok(of_all)) => Ok(Room { of_peer, of_all, share }),
            _ => Err(self.overloaded()),
        }
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
            && let Some(frame) = body.frame().await
        {
            let Ok(frame) = frame else {
                // The stream is reset, and whoever waits for this call drops it.
                return std::future::pending().await;
            };
            if let Some(data) = frame.data_ref() {
                self.make_room(message.len() + data.len(), room)?;
                // What was received lies in buffers that are far larger.
                message.extend_from_slice(data);
            }
        }
        Ok(Request::from_parts(parts, Full::new(message.into())))
    }

    /// A place among the calls under way. Waits for one, but not long.
    pub async fn enter<'a>(&'a self, share: &'a Share) -> Result<Place<'a>, Error> {
        let of_peer = share.calls.try_acquire().map_err(|_| self.overloaded())?;
        if let Ok(of_all) = self.calls.try_acquire() {
            return Ok(Place { _of_peer: of_peer, _of_all: of_all });
        }
        let _queued = self.queue.try_acquire().map_err(|_| self.overloaded())?;
        let of_all = timeout(MAX_WAIT, self.calls.acquire()).await;
        let of_all = of_all.map_err(|_| self.overloaded())?.map_err(Error::internal)?;
        Ok(Place { _of_peer: of_peer, _of_all: of_all })
    }

    /// Keeps the answer to a call in memory until it is sent.
    pub async fn answer(
        &self,
        response: Response<Body>,
        mut room: Room,
        sending: Sending,
    ) -> Result<Response<Body>, Error> {
        if response.body().is_end_stream() {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(Error::internal)?;
        let trailers = body.trailers().cloned().map(Ok);
        let bytes = body.to_bytes();
        self.wait_for_room(bytes.len(), &mut room).await?;
        let bytes = Bytes::from_owner(Answer { bytes, _room: room, _sending: sending });
        let body = Full::new(bytes).with_trailers(async { trailers });
        Ok(Response::from_parts(parts, Body::new(body)))
    }

    /// A place among the calls of health and reflection that a peer may have.
    pub fn enter_openly(&self, share: &Share) -> Result<OwnedSemaphorePermit, Error> {
        share.open_calls.clone().try_acquire_owned().map_err(|_| self.overloaded())
    }

    /// Makes room for a message of `length` bytes that grows.
    fn make_room(&self, length: usize, room: &mut Room) -> Result<(), Error> {
        let Some(missing) = kib(length)?.checked_sub(room.size()).filter(|more| *more > 0) else {
            return Ok(());
        };
        let of_peer = room.share.memory.clone().try_acquire_many_owned(missing);
        let of_all = self.memory.clone().try_acquire_many_owned(missing);
        match (of_peer, of_all) {
            (Ok(of_peer), Ok(of_all)) => room.add(of_peer, of_all),
            _ => return Err(self.overloaded()),
        }
        Ok(())
    }

    /// Makes room for a message of `length` bytes in place of another; gives back what is
    /// more, or waits for what is missing.
    async fn wait_for_room(&self, length: usize, room: &mut Room) -> Result<(), Error> {
        let needed = kib(length)?.max(SMALL);
        room.shrink(needed);
        let missing = needed - room.size();
        if missing == 0 {
            return Ok(());
        }
        let of_peer = room.share.memory.clone().acquire_many_owned(missing);
        let of_all = self.memory.clone().acquire_many_owned(missing);
        let more = timeout(MAX_WAIT, async { Ok((of_peer.await?, of_all.await?)) }).await;
        let more: Result<_, AcquireError> = more.map_err(|_| self.overloaded())?;
        let (of_peer, of_all) = more.map_err(Error::internal)?;
        room.add(of_peer, of_all);
        Ok(())
    }

    fn overloaded(&self) -> Error {
        self.shed.inc();
        Error::Overloaded
    }
}

fn kib(bytes: usize) -> Result<u32, Error> {
    u32::try_from(bytes.div_ceil(1024)).map_err(Error::internal)
}

impl Room {
    /// In KiB.
    fn size(&self) -> u32 {
        u32::try_from(self.of_all.num_permits()).unwrap_or(u32::MAX)
    }

    fn add(&mut self, of_peer: OwnedSemaphorePermit, of_all: OwnedSemaphorePermit) {
        self.of_peer.merge(of_peer);
        self.of_all.merge(of_all);
    }

    /// To `size` KiB, if it is larger.
    fn shrink(&mut self, size: u32) {
        let surplus = self.size().saturating_sub(size) as usize;
        drop((self.of_peer.split(surplus), self.of_all.split(surplus)));
    }
}

/// An answer, as long as it is in memory: in the hands of HTTP/2, too.
struct Answer {
    bytes: Bytes,
    _room: Room,
    _sending: Sending,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
