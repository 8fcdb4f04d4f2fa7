//! The request id: propagates or generates `x-request-id`, and returns it with the response.
//!
//! As the outermost layer, it turns a request into a [`Call`], which reads the metadata once.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll, ready},
};

use http::{HeaderValue, Response};
use pin_project_lite::pin_project;
use tonic::body::Body;
use tower::Service;

use super::{
    Context,
    call::{Call, X_REQUEST_ID},
};
use crate::transport::Inbound;

#[derive(Clone, Debug)]
pub(super) struct RequestId<S> {
    inner: S,
    context: Arc<Context>,
}

impl<S> RequestId<S> {
    pub(super) fn new(inner: S, context: Arc<Context>) -> Self {
        Self { inner, context }
    }
}

impl<S> Service<Inbound> for RequestId<S>
where
    S: Service<Call, Response = Response<Body>, Error = Infallible>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = RequestIdFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, inbound: Inbound) -> Self::Future {
        let call = Call::new(inbound, self.context.clone());
        let request_id = call.request_id.clone();
        RequestIdFuture { inner: self.inner.call(call), request_id: Some(request_id) }
    }
}

pin_project! {
    pub(super) struct RequestIdFuture<F> {
        #[pin]
        inner: F,
        request_id: Option<HeaderValue>,
    }
}

impl<F> Future for RequestIdFuture<F>
where
    F: Future<Output = Result<Response<Body>, Infallible>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Ok(mut response) = ready!(this.inner.poll(context));
        if let Some(request_id) = this.request_id.take() {
            response.headers_mut().insert(X_REQUEST_ID, request_id);
        }
        Poll::Ready(Ok(response))
    }
}
