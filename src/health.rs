//! The gRPC health service: what it says of each service, and the look at the database
//! that it follows.

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

use crate::{
    metrics::Gauge,
    types::error_chain::{BoxError, ErrorChain},
};

/// How often the database is looked at. With [`CHECK_TIMEOUT`], an outage is told
/// within two seconds.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// How long a look may take before the database counts as away: most of the two seconds,
/// since one on a machine that is busy for a moment is slow, and there.
const CHECK_TIMEOUT: Duration = Duration::from_millis(1_400);

/// The name that is SERVING as long as the process works, whatever the database does.
const LIVENESS: &str = "liveness";

/// A check whether the services can work.
pub trait ReadinessCheck: Send {
    /// Returns whether they can. The caller may drop the future at any await.
    fn check(&mut self) -> impl Future<Output = Result<bool, BoxError>> + Send;
}

/// Tells the health service what to say.
#[derive(Clone, Debug)]
pub struct Reporter {
    health: HealthReporter,
    /// The names that need the database.
    services: &'static [&'static str],
    /// What was said last of all that needs the database.
    is_ready: Arc<AtomicBool>,
    /// What the last look at the database found, 0 or 1.
    database_up: Gauge,
}

impl Reporter {
    /// All that needs the database is NOT_SERVING at first. Shows in `database_up` whether
    /// the database is.
    pub async fn new(
        services: &'static [&'static str],
        database_up: Gauge,
    ) -> (Self, HealthServer<impl Health>) {
        let health = HealthReporter::new();
        let service = HealthServer::new(HealthService::from_health_reporter(health.clone()));
        let this = Self { health, services, is_ready: Arc::default(), database_up };
        this.report(false).await;
        this.health.set_service_status(LIVENESS, ServingStatus::Serving).await;
        (this, service)
    }

    /// Follows the database for ever, after it was reported to be ready.
    pub async fn follow(self, mut database: impl ReadinessCheck) {
        let mut ticks = interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_ready = true;
        self.database_up.set(1);
        loop {
            ticks.tick().await;
            let looked = timeout(CHECK_TIMEOUT, database.check()).await;
            let is_ready = looked.map_err(BoxError::from).and_then(|looked| looked);
            if let Err(cause) = &is_ready {
                if was_ready {
                    tracing::warn!(cause = %ErrorChain(&**cause), "the database does not answer");
                }
            } else if was_ready && matches!(is_ready, Ok(false)) {
                tracing::warn!("the database's schema is not the one that is needed");
            }
            let is_ready = is_ready.unwrap_or(false);
            self.database_up.set(is_ready.into());
            // Watchers are told of changes only.
            if is_ready != was_ready {
                tracing::info!(is_ready, "readiness changed");
                self.report(is_ready).await;
                was_ready = is_ready;
            }
        }
    }

    /// Whether all that needs the database is said to be SERVING.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.is_ready.load(Ordering::Relaxed)
    }

    /// Says of all that needs the database whether it is ready.
    pub async fn report(&self, is_ready: bool) {
        let status = if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.is_ready.store(is_ready, Ordering::Relaxed);
        for name in self.services {
            self.health.set_service_status(name, status).await;
        }
    }
}
