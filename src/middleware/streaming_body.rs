//! The body of a stream: sends what the handler produces, and ends when a layer ends the stream.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use http::Response;
use http_body::Frame;
use hyper::body::Bytes;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Code, Status, body::Body};

use super::{buffer::hold_until_sent, call::StreamGuards, stream_progress::Progress};
use crate::{
    rpc::{error::Error, open_stream::OpenStream, status::status_code},
    telemetry::traces::TraceContext,
    transport::{ConnectionState, stall::StallGuard, stream_reset::reset_token},
};

type BodyError = <Body as http_body::Body>::Error;

type PolledFrame = Option<Result<Frame<Bytes>, BodyError>>;

/// What a response holds until HTTP/2 has sent its last frame: HTTP/2 takes a whole frame when
/// the client has space for a part of it, and then drops the body.
#[derive(Debug)]
pub(super) struct HeldUntilSent {
    _guards: StreamGuards,
    /// Set when the stream has ended: the client has to read what is left.
    stall: OnceLock<StallGuard>,
}

impl HeldUntilSent {
    pub(super) fn new(guards: StreamGuards) -> Self {
        Self { _guards: guards, stall: OnceLock::new() }
    }

    /// Makes a data frame hold the guards.
    pub(super) fn attach(self: Arc<Self>, frame: Frame<Bytes>) -> Frame<Bytes> {
        frame.map_data(|bytes| hold_until_sent(bytes, self))
    }

    /// Limits how long the client may take to read what is left.
    pub(super) fn end(&self, connection: &ConnectionState) {
        let _ = self.stall.set(connection.track_write());
    }
}

/// The body of a stream.
///
/// A task waits for the stream's end: HTTP/2 does not poll the body while the flow-control window
/// is closed. Then the handler is dropped at once, and the client has as long as for any response
/// to read the last message and the status.
///
/// A stream of the API that the client does not read is reset alone: behind a load balancer, many
/// callers share the connection. One of a system service makes its connection drain.
pub(super) struct StreamingBody {
    shared: Arc<Shared>,
    trace: TraceContext,
    /// Ends the task with the body.
    _supervisor: DropGuard,
}

/// What the body and the task share.
struct Shared {
    state: Mutex<State>,
    held: Arc<HeldUntilSent>,
    connection: Arc<ConnectionState>,
    /// `None` for a stream of a system service.
    api: Option<ApiStream>,
}

struct ApiStream {
    open: OpenStream,
    progress: Arc<Progress>,
    reset: CancellationToken,
}

enum State {
    Open {
        body: Body,
        /// What is left of a message that the handler has sent.
        message: Bytes,
        waker: Option<Waker>,
    },
    /// The stream ends with these messages and this status.
    Ending {
        messages: VecDeque<Bytes>,
        end: End,
    },
    Done,
}

/// The status at the end of a stream.
enum End {
    /// A layer has ended the stream.
    Error(Error),
    /// The handler has ended the stream.
    Handler(PolledFrame),
}

impl StreamingBody {
    pub(super) fn wrap(
        body: Body,
        held: Arc<HeldUntilSent>,
        connection: Arc<ConnectionState>,
        open: Option<OpenStream>,
        end: impl Future<Output = Error> + Send + 'static,
    ) -> Body {
        let api =
            open.map(|open| ApiStream { open, progress: Progress::new(), reset: reset_token() });
        let state = Mutex::new(State::Open { body, message: Bytes::new(), waker: None });
        let shared = Arc::new(Shared { state, held, connection, api });
        let stop = CancellationToken::new();
        tokio::spawn(stop.clone().run_until_cancelled_owned(supervise(shared.clone(), end)));
        let trace = TraceContext::current();
        Body::new(Self { shared, trace, _supervisor: stop.drop_guard() })
    }
}

/// Waits until the stream has to end, and then until the client has read its end. Resets the stream
/// of a client that reads nothing.
async fn supervise(shared: Arc<Shared>, end: impl Future<Output = Error>) {
    let Some(api) = &shared.api else {
        shared.terminate(end.await);
        return;
    };
    tokio::select! {
        reason = end => {
            shared.terminate(reason);
            api.progress.stalled().await;
        }
        () = api.progress.stalled() => api.open.set_unread(),
    }
    api.reset.cancel();
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the stream, unless its handler has.
    fn terminate(&self, reason: Error) {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, State::Done) {
            State::Open { body, message, waker } => {
                if let Some(api) = &self.api {
                    api.open.set_reason(&reason);
                }
                *state = self.ending(message, true, End::Error(reason));
                drop(state);
                drop(body);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            other => *state = other,
        }
    }

    /// Returns the state of a stream that ends after what is left of a message.
    fn ending(&self, message: Bytes, is_error: bool, end: End) -> State {
        let last = self.api.as_ref().filter(|_| is_error);
        let last = last.and_then(|api| api.open.take_last_message());
        let messages = last.into_iter().fold(VecDeque::from([message]), |mut messages, last| {
            messages.push_back(last);
            messages
        });
        match &self.api {
            Some(api) => api.progress.end(),
            None => self.held.end(&self.connection),
        }
        State::Ending { messages, end }
    }

    /// Makes a frame of a message, or of its next chunk.
    fn next_frame(&self, message: &mut Bytes) -> Frame<Bytes> {
        let held = self.held.clone();
        match &self.api {
            Some(api) => Frame::data(api.progress.next_chunk(message, held)),
            None => held.attach(Frame::data(std::mem::take(message))),
        }
    }

    /// Waits until the next frame may follow.
    fn poll_ready(&self, context: &mut Context<'_>) -> Poll<()> {
        self.api.as_ref().map_or(Poll::Ready(()), |api| api.progress.poll_ready(context))
    }

    /// Polls the handler. Returns `None` when the state has changed.
    fn poll_open(
        &self,
        state: &mut State,
        trace: &TraceContext,
        context: &mut Context<'_>,
    ) -> Option<Poll<PolledFrame>> {
        let State::Open { body, message, waker } = state else {
            return None;
        };
        if !message.is_empty() {
            if self.poll_ready(context).is_pending() {
                *waker = Some(context.waker().clone());
                return Some(Poll::Pending);
            }
            return Some(Poll::Ready(Some(Ok(self.next_frame(message)))));
        }
        let polled = trace.enter(|| http_body::Body::poll_frame(Pin::new(body), context));
        if let Some(sent) = self.api.as_ref().and_then(|api| api.open.take_message()) {
            *message = sent;
            return None;
        }
        let frame = match polled {
            Poll::Pending => {
                *waker = Some(context.waker().clone());
                return Some(Poll::Pending);
            }
            Poll::Ready(frame) => frame,
        };
        match frame {
            Some(Ok(frame)) if frame.is_data() => {
                *message = frame.into_data().unwrap_or_default();
            }
            end => {
                let trailers = end.as_ref().and_then(|end| end.as_ref().ok()?.trailers_ref());
                let code = trailers.and_then(status_code);
                let is_error = code.is_some_and(|code| code != Code::Ok);
                *state = self.ending(Bytes::new(), is_error, End::Handler(end));
            }
        }
        None
    }

    /// Polls what is left when the stream ends.
    fn poll_ending(&self, state: &mut State, context: &mut Context<'_>) -> Poll<PolledFrame> {
        let State::Ending { messages, .. } = state else {
            return Poll::Ready(None);
        };
        while let Some(message) = messages.front_mut() {
            if message.is_empty() {
                messages.pop_front();
                continue;
            }
            ready!(self.poll_ready(context));
            return Poll::Ready(Some(Ok(self.next_frame(message))));
        }
        if let Some(api) = &self.api {
            ready!(api.progress.poll_sent(context));
        }
        let State::Ending { end, .. } = std::mem::replace(state, State::Done) else {
            return Poll::Ready(None);
        };
        Poll::Ready(match end {
            End::Error(reason) => {
                let response: Response<Body> = Status::from(reason).into_http();
                Some(Ok(Frame::trailers(response.into_parts().0.headers)))
            }
            End::Handler(frame) => frame,
        })
    }
}

impl http_body::Body for StreamingBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut state = self.shared.lock();
        while matches!(*state, State::Open { .. }) {
            if let Some(polled) = self.shared.poll_open(&mut state, &self.trace, context) {
                return polled;
            }
        }
        self.shared.poll_ending(&mut state, context)
    }
}
