//! How much the service takes on at once: calls, and the memory of answers on their way.

use std::{sync::Arc, time::Duration};

use http::Response;
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit},
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::body::Body;

use crate::{error::Error, metrics::Counter};

/// How long a call waits to be let in: a fraction of any deadline, so that a caller that
/// is turned away can go elsewhere.
const MAX_WAIT: Duration = Duration::from_millis(500);

/// Answers above this size, in bytes, are counted. Below, the number of calls is limit
/// enough.
const SMALL_ANSWER: usize = 4 * 1024;

/// Memory for answers that are made but not read, in KiB: some dozens of the largest.
const ANSWERS_KIB: usize = 24 * 1024;

/// How long a caller may take to read an answer. Who reads slower loses the connection:
/// otherwise a few slow readers would keep all the memory.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Lets calls in, and answers out.
#[derive(Debug)]
pub struct Admission {
    calls: Semaphore,
    queue: Semaphore,
    answers: Arc<Semaphore>,
    shed: Counter,
}

impl Admission {
    /// For `max_calls` at once, and as many that wait. Counts in `shed` what is turned away.
    #[must_use]
    pub fn new(max_calls: usize, shed: Counter) -> Self {
        Self {
            calls: Semaphore::new(max_calls),
            queue: Semaphore::new(max_calls),
            answers: Arc::new(Semaphore::new(ANSWERS_KIB)),
            shed,
        }
    }

    /// A place among the calls under way. Waits for one, but not long.
    pub async fn enter(&self) -> Result<SemaphorePermit<'_>, Error> {
        if let Ok(place) = self.calls.try_acquire() {
            return Ok(place);
        }
        let _queued = self.queue.try_acquire().map_err(|_| self.overloaded())?;
        let place = timeout(MAX_WAIT, self.calls.acquire()).await;
        place.map_err(|_| self.overloaded())?.map_err(Error::internal)
    }

    /// Keeps the answer to a call in memory until it is sent. Cancels `stuck` when the
    /// caller does not read it.
    pub async fn answer(
        &self,
        response: Response<Body>,
        stuck: &CancellationToken,
    ) -> Result<Response<Body>, Error> {
        if response.body().is_end_stream() {
            return Ok(response);
        }
        let (parts, body) = response.into_parts();
        let body = body.collect().await.map_err(Error::internal)?;
        let trailers = body.trailers().cloned().map(Ok);
        let mut bytes = body.to_bytes();
        if bytes.len() > SMALL_ANSWER {
            bytes = Bytes::from_owner(self.counted(bytes, stuck.clone()).await?);
        }
        let body = Full::new(bytes).with_trailers(async { trailers });
        Ok(Response::from_parts(parts, Body::new(body)))
    }

    fn overloaded(&self) -> Error {
        self.shed.inc();
        Error::Overloaded
    }

    async fn counted(&self, bytes: Bytes, stuck: CancellationToken) -> Result<Answer, Error> {
        let kib = u32::try_from(bytes.len().div_ceil(1024)).map_err(Error::internal)?;
        let room = timeout(MAX_WAIT, self.answers.clone().acquire_many_owned(kib)).await;
        let room = room.map_err(|_| self.overloaded())?.map_err(Error::internal)?;
        let sent = CancellationToken::new();
        tokio::spawn({
            let sent = sent.clone();
            async move {
                tokio::select! {
                    () = sent.cancelled() => {}
                    () = sleep(READ_TIMEOUT) => stuck.cancel(),
                }
            }
        });
        Ok(Answer { bytes, _room: room, _sent: sent.drop_guard() })
    }
}

/// A large answer, as long as it is in memory: in the hands of HTTP/2, too.
struct Answer {
    bytes: Bytes,
    _room: OwnedSemaphorePermit,
    _sent: DropGuard,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
