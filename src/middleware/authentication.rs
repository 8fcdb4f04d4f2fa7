//! Authentication: adds the caller to the request, by the policy of the method.

use std::task::{Context as TaskContext, Poll};

use http::Response;
use tonic::body::Body;
use tower::Service;
use tracing::{Span, field};

use super::{
    ResponseFuture,
    call::{Call, StreamCredential},
};
use crate::{
    rpc::{error::Error, policy::Access},
    telemetry::traces,
};

#[derive(Clone, Debug)]
pub(super) struct Authentication<S> {
    inner: S,
}

impl<S> Authentication<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S, B> Service<Call<B>> for Authentication<S>
where
    S: Service<Call<B>, Response = Response<Body>, Error = Error> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut call: Call<B>) -> Self::Future {
        let mut inner = self.inner.clone();
        Box::pin(async move {
            authenticate(&mut call).await?;
            // Only now: a client that may not call does not learn what is invalid in the call.
            call.check_timeout()?;
            inner.call(call).await
        })
    }
}

/// Adds the caller, unless the method is public. Every credential is a session, so the levels
/// `CALLER` and `SESSION` require the same.
async fn authenticate<B>(call: &mut Call<B>) -> Result<(), Error> {
    let method = call.method.ok_or(Error::Unimplemented)?;
    if method.access == Access::Public {
        return Ok(());
    }
    let authenticator = &call.context.api()?.authenticator;
    let token = authenticator.verify(call.request.headers())?;
    // Watched before it is checked, so that no revocation falls between.
    let session = method.server_streaming.then(|| authenticator.sessions.watch(token.caller));
    authenticator.check_session(token.caller).await?;
    Span::current().record("user_id", field::display(token.caller.user_id));
    traces::record_user_id(token.caller.user_id);
    call.request.extensions_mut().insert(token.caller);
    call.stream_credential = session.map(|session| StreamCredential {
        accepted_until: authenticator.accepted_until(&token),
        session,
    });
    Ok(())
}
