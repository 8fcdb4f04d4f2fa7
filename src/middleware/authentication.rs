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
    rpc::{
        caller::{Caller, ClientIp, Credential},
        error::Error,
        policy::Access,
    },
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

/// Adds the caller, unless the method is public. Only a valid token is checked for the access that
/// the method requires.
async fn authenticate<B>(call: &mut Call<B>) -> Result<(), Error> {
    let method = call.method.ok_or(Error::Unimplemented)?;
    if method.access == Access::Public {
        return Ok(());
    }
    let authenticator = &call.context.api()?.authenticator;
    let token = authenticator.parse(call.request.headers())?;
    // Watched before it is looked up, so that no revocation falls between.
    let watch = method.server_streaming.then(|| authenticator.sessions.watch(token.caller()));
    let client_ip = ClientIp::from_extensions(call.request.extensions())?;
    let token = authenticator.authenticate(token, client_ip).await?;
    record(token.caller);
    token.check_access(&method)?;
    call.request.extensions_mut().insert(token.caller);
    call.stream_credential = watch.map(|watch| StreamCredential {
        accepted_until: authenticator.accepted_until(&token),
        watch,
    });
    Ok(())
}

/// Adds the caller to all lines of the call, which show what a leaked credential did.
fn record(caller: Caller) {
    let span = Span::current();
    span.record("user_id", field::display(caller.user_id));
    match caller.credential {
        Credential::Session(id) => span.record("session_id", field::display(id)),
        Credential::PersonalAccessToken(id) => {
            span.record("personal_access_token_id", field::display(id))
        }
    };
    traces::record_user_id(caller.user_id);
}
