//! The gRPC health service and the database check that drives its readiness status.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::ReusableBoxFuture;
use tonic::{Request, Response, Status, codegen::tokio_stream::Stream};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health, HealthServer},
};

use super::metrics::Gauge;
use crate::types::error_chain::{BoxError, ErrorChain};

/// The interval of the database check. With [`CHECK_TIMEOUT`], readiness follows an outage
/// within two seconds.
///
/// Test: `a_hanging_database_fails_calls_in_time_and_the_pool_recovers`.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// How long a check may take before the database counts as unavailable: most of the two
/// seconds, because a database on a busy machine is slow, but available.
///
/// Test: `a_hanging_database_fails_calls_in_time_and_the_pool_recovers`.
const CHECK_TIMEOUT: Duration = Duration::from_millis(1_400);

/// The name that is SERVING while the process works, whatever the database does.
const LIVENESS_SERVICE: &str = "liveness";

/// A check whether the services can work.
pub(crate) trait ReadinessCheck: Send {
    /// Returns `true` if the database is reachable and its schema is current. The caller may
    /// drop the future at any await.
    fn check(&mut self) -> impl Future<Output = Result<bool, BoxError>> + Send;
}

/// Sets the status of the services that need the database.
#[derive(Clone, Debug)]
pub(crate) struct ReadinessReporter {
    statuses: Statuses,
    /// The names of these services.
    services: &'static [&'static str],
    ready: Arc<AtomicBool>,
    /// The result of the last check, 0 or 1.
    database_up: Gauge,
}

impl ReadinessReporter {
    /// Creates the reporter and its health service. All `services` are NOT_SERVING.
    pub(crate) fn new(
        services: &'static [&'static str],
        database_up: Gauge,
    ) -> (Self, HealthServer<HealthService>) {
        let statuses = Statuses::default();
        let service = HealthServer::new(HealthService { statuses: statuses.clone() });
        let this = Self { statuses, services, ready: Arc::default(), database_up };
        this.set_ready(false);
        this.statuses.set(&[LIVENESS_SERVICE], ServingStatus::Serving);
        (this, service)
    }

    /// Checks the database until the future is dropped, and sets the status accordingly. The
    /// services are ready when it starts.
    pub(crate) async fn watch_database(self, mut database: impl ReadinessCheck) {
        let mut ticks = interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_ready = true;
        self.database_up.set(1);
        loop {
            ticks.tick().await;
            let checked = timeout(CHECK_TIMEOUT, database.check()).await;
            let checked = checked.map_err(BoxError::from).and_then(|checked| checked);
            if was_ready {
                match &checked {
                    Ok(true) => {}
                    Ok(false) => tracing::warn!("database schema is outdated"),
                    Err(error) => {
                        let error = ErrorChain(&**error);
                        tracing::warn!(%error, "database health check failed");
                    }
                }
            }
            let ready = checked.unwrap_or(false);
            self.database_up.set(ready.into());
            if ready != was_ready {
                tracing::info!(ready, "readiness changed");
                self.set_ready(ready);
                was_ready = ready;
            }
        }
    }

    /// Returns `true` if the services that need the database are SERVING.
    #[must_use]
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Relaxed)
    }

    /// Sets the status of the services that need the database.
    pub(crate) fn set_ready(&self, ready: bool) {
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.ready.store(ready, Ordering::Relaxed);
        self.statuses.set(self.services, status);
    }
}

/// The status of each service that the health service knows, by name.
#[derive(Clone, Debug, Default)]
struct Statuses(watch::Sender<HashMap<&'static str, ServingStatus>>);

impl Statuses {
    fn set(&self, services: &[&'static str], status: ServingStatus) {
        self.0.send_modify(|statuses| statuses.extend(services.iter().map(|name| (*name, status))));
    }
}

/// The implementation of `grpc.health.v1.Health`, as `health.proto` describes it. That of
/// tonic-health rejects the watch of an unknown service.
#[derive(Debug)]
pub(crate) struct HealthService {
    statuses: Statuses,
}

#[tonic::async_trait]
impl Health for HealthService {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let status = self.statuses.0.borrow().get(&*request.get_ref().service).copied();
        let status = status.ok_or_else(|| Status::not_found("service not registered"))?;
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    type WatchStream = WatchStream;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        let service = request.into_inner().service;
        Ok(Response::new(WatchStream::new(service, self.statuses.clone())))
    }
}

/// The statuses of one service: the current one, SERVICE_UNKNOWN if there is none, and then each
/// that differs from the last.
#[derive(Debug)]
pub(crate) struct WatchStream {
    service: String,
    last: Option<ServingStatus>,
    next: ReusableBoxFuture<'static, watch::Receiver<HashMap<&'static str, ServingStatus>>>,
    /// Without a sender, a watch would end.
    _statuses: Statuses,
}

impl WatchStream {
    fn new(service: String, statuses: Statuses) -> Self {
        let mut receiver = statuses.0.subscribe();
        receiver.mark_changed();
        let next = ReusableBoxFuture::new(changed(receiver));
        Self { service, last: None, next, _statuses: statuses }
    }
}

async fn changed<T>(mut receiver: watch::Receiver<T>) -> watch::Receiver<T> {
    // Fails only without a sender.
    let _ = receiver.changed().await;
    receiver
}

impl Stream for WatchStream {
    type Item = Result<HealthCheckResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let mut receiver = ready!(self.next.poll(context));
            let status = receiver.borrow_and_update().get(&*self.service).copied();
            let status = status.unwrap_or(ServingStatus::ServiceUnknown);
            self.next.set(changed(receiver));
            if self.last.replace(status) != Some(status) {
                return Poll::Ready(Some(Ok(HealthCheckResponse { status: status.into() })));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic::codegen::tokio_stream::StreamExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_watch_reports_each_change_of_its_service_once() {
        let statuses = Statuses::default();
        let mut watch = WatchStream::new("a".to_owned(), statuses.clone());
        let mut next = async || {
            let next = timeout(Duration::from_secs(1), watch.next()).await.ok()?;
            Some(next.expect("the watch is open").expect("no error").status())
        };
        assert_eq!(next().await, Some(ServingStatus::ServiceUnknown));
        statuses.set(&["b"], ServingStatus::Serving);
        assert_eq!(next().await, None, "another service");
        // The service becomes known.
        statuses.set(&["a", "b"], ServingStatus::NotServing);
        assert_eq!(next().await, Some(ServingStatus::NotServing));
        statuses.set(&["a"], ServingStatus::NotServing);
        assert_eq!(next().await, None, "the same status");
        statuses.set(&["a"], ServingStatus::Serving);
        assert_eq!(next().await, Some(ServingStatus::Serving));
    }
}
