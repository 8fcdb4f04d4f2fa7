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
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context as TaskContext, Poll, Waker},
};

use http::Response;
use http_body::{Body as _, Frame};
use http_body_util::BodyExt;
use hyper::body::Bytes;
use tokio::time::{Instant, sleep_until};
use tokio_util::{
    either::Either,
    sync::{CancellationToken, DropGuard},
};
use tonic::{Status, body::Body};
use tower::Service;

use super::{
    ResponseFuture,
    buffer::hold_until_sent,
    call::{Call, StreamCredential, StreamGuards},
};
use crate::{
    rpc::{
        error::Error,
        policy::{MAX_REFLECTION_STREAM_AGE, System},
    },
    telemetry::traces::TraceContext,
    transport::{ConnectionState, stall::StallGuard},
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
            // An error before the first message: the headers end the stream.
            if response.body().is_end_stream() {
                return Ok(response);
            }
            let guards = Arc::new(HeldUntilSent { _guards: guards, stall: OnceLock::new() });
            Ok(response.map(|body| {
                if let Some(end) = end {
                    return StreamingBody::wrap(body, guards, connection, end);
                }
                // A unary response of a system service: small, and not buffered.
                guards.end(&connection);
                Body::new(body.map_frame(move |frame| guards.clone().attach(frame)))
            }))
        }))
    }
}

/// What a response holds until HTTP/2 has sent its last frame: HTTP/2 takes a whole frame when
/// the client has room for a part of it, and then drops the body.
#[derive(Debug)]
struct HeldUntilSent {
    _guards: StreamGuards,
    /// Set when the stream has ended: the client has to read what is left.
    stall: OnceLock<StallGuard>,
}

impl HeldUntilSent {
    /// Makes a data frame hold the guards.
    fn attach(self: Arc<Self>, frame: Frame<Bytes>) -> Frame<Bytes> {
        frame.map_data(|bytes| hold_until_sent(bytes, self))
    }

    /// Limits how long the client may take to read what is left.
    fn end(&self, connection: &ConnectionState) {
        let _ = self.stall.set(connection.track_write());
    }
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
        let credential = credential.as_ref();
        tokio::select! {
            () = drain.cancelled() => Error::Stopping,
            () = or_never(deadline.map(sleep_until)) => Error::DeadlineExceeded,
            server_time = or_never(credential.map(StreamCredential::expired)) => {
                Error::TokenExpired { server_time }
            }
            () = or_never(credential.map(|it| it.session.ended())) => Error::SessionRevoked,
        }
    }
}

/// Waits for an event, or forever if it cannot happen.
async fn or_never<T>(event: Option<impl Future<Output = T>>) -> T {
    match event {
        Some(event) => event.await,
        None => pending().await,
    }
}

/// The body of a stream.
///
/// A task waits for the stream's end: HTTP/2 does not poll the body while the flow-control window
/// is closed. Then the handler is dropped at once, and the client has as long as for any response
/// to read the status.
struct StreamingBody {
    state: Arc<Mutex<State>>,
    connection: Arc<ConnectionState>,
    trace: TraceContext,
    /// Ends the task with the body.
    _supervisor: DropGuard,
}

enum State {
    Open {
        body: Body,
        held: Arc<HeldUntilSent>,
        waker: Option<Waker>,
    },
    /// The stream has to end with this status. The guards stay until HTTP/2 drops the body.
    Terminated {
        reason: Option<Error>,
        _held: Arc<HeldUntilSent>,
    },
    /// The handler has ended the stream.
    Done,
}

impl StreamingBody {
    fn wrap(
        body: Body,
        held: Arc<HeldUntilSent>,
        connection: Arc<ConnectionState>,
        end: StreamEnd,
    ) -> Body {
        let state = Arc::new(Mutex::new(State::Open { body, held, waker: None }));
        let stop = CancellationToken::new();
        let (supervised, supervised_connection) = (state.clone(), connection.clone());
        let supervisor = async move {
            let reason = end.wait().await;
            terminate(&supervised, reason, &supervised_connection);
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(supervisor));
        let trace = TraceContext::current();
        Body::new(Self { state, connection, trace, _supervisor: stop.drop_guard() })
    }
}

fn terminate(state: &Mutex<State>, reason: Error, connection: &ConnectionState) {
    let mut state = lock(state);
    match std::mem::replace(&mut *state, State::Done) {
        State::Open { body, held, waker } => {
            held.end(connection);
            *state = State::Terminated { reason: Some(reason), _held: held };
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
        let end = match &mut *state {
            State::Open { body, held, waker } => {
                let polled = self.trace.enter(|| Pin::new(body).poll_frame(context));
                match polled {
                    Poll::Pending => {
                        *waker = Some(context.waker().clone());
                        return Poll::Pending;
                    }
                    Poll::Ready(Some(Ok(frame))) if frame.is_data() => {
                        return Poll::Ready(Some(Ok(held.clone().attach(frame))));
                    }
                    Poll::Ready(end) => {
                        held.end(&self.connection);
                        end
                    }
                }
            }
            State::Terminated { reason, .. } => {
                let trailers = reason.take().map(|reason| {
                    let response: Response<Body> = Status::from(reason).into_http();
                    Ok(Frame::trailers(response.into_parts().0.headers))
                });
                return Poll::Ready(trailers);
            }
            State::Done => None,
        };
        *state = State::Done;
        Poll::Ready(end)
    }
}
