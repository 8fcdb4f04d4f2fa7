//! The routes: health and reflection from the start, the API once the database is ready.

use std::{
    future::{Ready, ready},
    pin::Pin,
    sync::Arc,
    task::{Context as TaskContext, Poll, ready},
};

use http::{Request, Response};
use hyper::body::Bytes;
use tokio_util::either::Either;
use tonic::{body::Body, service::Routes};
use tower::Service;

use super::{Context, call::Call};
use crate::{auth::authenticator::Authenticator, rpc::error::Error, types::error_chain::BoxError};

/// The services of the API, and what authenticates their callers.
#[derive(Debug)]
pub(crate) struct ApiRoutes {
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) routes: Routes,
}

impl Context {
    /// Serves the API from now on. Only the first call has an effect.
    pub(crate) fn mount_api(&self, api: ApiRoutes) {
        let _ = self.api.set(api);
    }

    /// Returns the API.
    ///
    /// # Errors
    /// [`Error::DatabaseUnavailable`] while the server starts.
    pub(super) fn api(&self) -> Result<&ApiRoutes, Error> {
        let starting = || Error::DatabaseUnavailable("the server is starting".into());
        self.api.get().ok_or_else(starting)
    }
}

#[derive(Clone, Debug)]
pub(super) struct ServiceRoutes;

impl<B> Service<Call<B>> for ServiceRoutes
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<Body>;
    type Error = Error;
    type Future = Either<RouteFuture, Ready<Result<Response<Body>, Error>>>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: Call<B>) -> Self::Future {
        let is_system = call.method.is_some_and(|method| method.system.is_some());
        let routes = if is_system {
            Ok(&call.context.system)
        } else {
            call.context.api().map(|api| &api.routes)
        };
        match routes {
            Ok(routes) => Either::Left(RouteFuture(routes.clone().call(call.request))),
            Err(error) => Either::Right(ready(Err(error))),
        }
    }
}

/// The future of a handler.
pub(super) struct RouteFuture(<Routes as Service<Request<Body>>>::Future);

impl Future for RouteFuture {
    type Output = Result<Response<Body>, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let Ok(response) = ready!(Pin::new(&mut self.0).poll(context));
        Poll::Ready(Ok(response))
    }
}
