//! Streams: a response that is not buffered holds its permit and memory until it is sent, and
//! ends with a status when it has to.
//!
//! A stream ends at the client's deadline, at the expiry of the access token, with the session,
//! when its connection drains (maximum age, idle, shutdown), or, for reflection, at its maximum
//! age. There is no channel between the handler and HTTP/2: the body polls the handler when the
//! flow-control window is open (backpressure).

use std::{
    future::pending,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context as TaskContext, Poll, Waker},
    time::Duration,
};

use http::Response;
use http_body::Frame;
use http_body_util::BodyExt;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::{
    either::Either,
    sync::{CancellationToken, DropGuard},
};
use tonic::{Status, body::Body};
use tower::Service;

use super::{
    ResponseFuture,
    call::{Call, StreamCredential, StreamGuards},
};
use crate::{
    auth::sessions::SessionWatch,
    rpc::{
        error::Error,
        policy::{MAX_REFLECTION_STREAM_AGE, System},
    },
    telemetry::traces::TraceContext,
    transport::{ConnectionState, stall::StallGuard},
    types::clock,
};

#[derive(Clone, Debug)]
pub(super) struct Stream<S> {
    inner: S,
}

impl<S> Stream<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S, B> Service<Call<B>> for Stream<S>
where
    S: Service<Call<B>, Response = Response<Body>, Error = Error>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<S::Future, ResponseFuture>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut call: Call<B>) -> Self::Future {
        let Some(guards) = call.stream_guards.take() else {
            return Either::Left(self.inner.call(call));
        };
        let end = call.is_stream().then(|| StreamEnd::new(&mut call));
        let connection = call.connection.clone();
        let response = self.inner.call(call);
        Either::Right(Box::pin(async move {
            let response = response.await?;
            Ok(response.map(|body| match end {
                Some(end) => StreamingBody::wrap(body, guards, connection, end),
                // A unary response of a system service: small, and not buffered.
                None => hold(body, guards),
            }))
        }))
    }
}

/// Returns a body that holds the guards until it is sent.
fn hold(body: Body, guards: StreamGuards) -> Body {
    Body::new(body.map_frame(move |frame| {
        let _ = &guards;
        frame
    }))
}

/// What ends a stream before its handler does.
struct StreamEnd {
    deadline: Option<Instant>,
    credential: Option<StreamCredential>,
    drain: CancellationToken,
}

impl StreamEnd {
    fn new<B>(call: &mut Call<B>) -> Self {
        let is_reflection =
            call.method.is_some_and(|method| method.system == Some(System::Reflection));
        let max_age = is_reflection.then(|| call.received_at + MAX_REFLECTION_STREAM_AGE);
        Self {
            deadline: call.client_deadline().into_iter().chain(max_age).min(),
            credential: call.stream_credential.take(),
            drain: call.connection.drain.clone(),
        }
    }

    /// Waits until the stream has to end, and returns why.
    async fn wait(self) -> Error {
        let Self { deadline, credential, drain } = self;
        let (token, session) = credential.map(|it| (it.token, it.session)).unzip();
        tokio::select! {
            () = drain.cancelled() => Error::Stopping,
            () = or_never(deadline.map(sleep_until)) => Error::DeadlineExceeded,
            () = or_never(token.map(|token| sleep(time_left(token.expires_at)))) => {
                Error::TokenExpired
            }
            () = or_never(session.as_ref().map(SessionWatch::ended)) => Error::SessionRevoked,
        }
    }
}

/// Waits for an event, or forever if it cannot happen.
async fn or_never(event: Option<impl Future<Output = ()>>) {
    match event {
        Some(event) => event.await,
        None => pending().await,
    }
}

/// Returns the time from now until a time of day.
fn time_left(until: OffsetDateTime) -> Duration {
    Duration::try_from(until - clock::now()).unwrap_or_default()
}

/// The body of a stream.
///
/// A task waits for the stream's end: HTTP/2 does not poll the body while the flow-control
/// window is closed. Then the handler is dropped at once, and the client has as long as for any response
/// to read the status.
struct StreamingBody {
    state: Arc<Mutex<State>>,
    trace: TraceContext,
    /// Ends the task with the body.
    _supervisor: DropGuard,
}

enum State {
    Open {
        body: Body,
        guards: StreamGuards,
        waker: Option<Waker>,
    },
    /// The stream has to end with this status.
    Terminated {
        reason: Option<Error>,
        _guards: StreamGuards,
        _stall: StallGuard,
    },
    /// The handler has ended the stream.
    Done,
}

impl StreamingBody {
    fn wrap(
        body: Body,
        guards: StreamGuards,
        connection: Arc<ConnectionState>,
        end: StreamEnd,
    ) -> Body {
        let state = Arc::new(Mutex::new(State::Open { body, guards, waker: None }));
        let stop = CancellationToken::new();
        let supervised = state.clone();
        let supervisor = async move {
            let reason = end.wait().await;
            terminate(&supervised, reason, &connection);
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(supervisor));
        let trace = TraceContext::current();
        Body::new(Self { state, trace, _supervisor: stop.drop_guard() })
    }
}

fn terminate(state: &Mutex<State>, reason: Error, connection: &ConnectionState) {
    let mut state = lock(state);
    match std::mem::replace(&mut *state, State::Done) {
        State::Open { body, guards, waker } => {
            *state = State::Terminated {
                reason: Some(reason),
                _guards: guards,
                _stall: connection.track_write(),
            };
            drop(state);
            drop(body);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        other => *state = other,
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl http_body::Body for StreamingBody {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let mut state = lock(&self.state);
        let frame = match &mut *state {
            State::Open { body, waker, .. } => {
                let polled = self.trace.enter(|| Pin::new(body).poll_frame(context));
                match polled {
                    Poll::Pending => {
                        *waker = Some(context.waker().clone());
                        return Poll::Pending;
                    }
                    Poll::Ready(Some(Ok(frame))) if frame.is_data() => {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                    Poll::Ready(end) => end,
                }
            }
            State::Terminated { reason, .. } => {
                let trailers = reason.take().map(|reason| {
                    let response: Response<Body> = Status::from(reason).into_http();
                    Ok(Frame::trailers(response.into_parts().0.headers))
                });
                // The guards stay until HTTP/2 drops the body: then the client has the status.
                return Poll::Ready(trailers);
            }
            State::Done => None,
        };
        *state = State::Done;
        Poll::Ready(frame)
    }
}
