//! The gRPC health service and the database check that drives its readiness status.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::{HealthReporter, HealthService},
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
    health: HealthReporter,
    /// The names of these services.
    services: &'static [&'static str],
    ready: Arc<AtomicBool>,
    /// The result of the last check, 0 or 1.
    database_up: Gauge,
}

impl ReadinessReporter {
    /// Creates the reporter and its health service. All `services` are NOT_SERVING.
    pub(crate) async fn new(
        services: &'static [&'static str],
        database_up: Gauge,
    ) -> (Self, HealthServer<impl Health>) {
        let health = HealthReporter::new();
        let service = HealthServer::new(HealthService::from_health_reporter(health.clone()));
        let this = Self { health, services, ready: Arc::default(), database_up };
        this.set_ready(false).await;
        this.health.set_service_status(LIVENESS_SERVICE, ServingStatus::Serving).await;
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
            // Watch sends a message for each status that is set, changed or not.
            if ready != was_ready {
                tracing::info!(ready, "readiness changed");
                self.set_ready(ready).await;
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
    pub(crate) async fn set_ready(&self, ready: bool) {
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.ready.store(ready, Ordering::Relaxed);
        for name in self.services {
            self.health.set_service_status(name, status).await;
        }
    }
}
