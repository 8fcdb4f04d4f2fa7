//! Rejects calls that cannot succeed before they cost anything: requests that are no gRPC calls,
//! unknown methods, and calls of methods that need a caller without credentials.

use std::{
    future::{Ready, ready},
    task::{Context as TaskContext, Poll},
};

use http::{
    HeaderMap, Method, Response,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use tokio_util::either::Either;
use tonic::body::Body;
use tower::Service;

use super::call::Call;
use crate::rpc::{error::Error, policy::Access, protocol::ProtocolError};

#[derive(Clone, Debug)]
pub(super) struct Policy<S> {
    inner: S,
}

impl<S> Policy<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner }
    }
}

const GRPC: &[u8] = b"application/grpc";

/// Returns `true` for `application/grpc` in any case, also with a suffix such as `+proto` or
/// parameters.
fn is_grpc(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).map_or(&b""[..], |value| value.as_bytes());
    let parts = content_type.split_at_checked(GRPC.len());
    parts.is_some_and(|(media_type, rest)| {
        media_type.eq_ignore_ascii_case(GRPC) && matches!(rest, [] | [b'+' | b';' | b' ', ..])
    })
}

fn check(call: &Call) -> Result<(), Error> {
    if call.request.method() != Method::POST {
        return Err(ProtocolError::NotPost.into());
    }
    if !is_grpc(call.request.headers()) {
        return Err(ProtocolError::ContentType.into());
    }
    let method = call.method.ok_or(Error::Unimplemented)?;
    let has_credentials = call.request.headers().contains_key(AUTHORIZATION);
    // While the server starts, every call of the API gets UNAVAILABLE.
    let is_started = || call.context.api.get().is_some();
    if method.access != Access::Public && !has_credentials && is_started() {
        return Err(Error::NotAuthenticated);
    }
    Ok(())
}

impl<S> Service<Call> for Policy<S>
where
    S: Service<Call, Response = Response<Body>, Error = Error>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<S::Future, Ready<Result<Response<Body>, Error>>>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, call: Call) -> Self::Future {
        match check(&call) {
            Ok(()) => Either::Left(self.inner.call(call)),
            Err(error) => Either::Right(ready(Err(error))),
        }
    }
}
