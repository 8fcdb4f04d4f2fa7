//! The gRPC health service: what it says of each service, and the look at the database
//! that it follows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::PgConnection;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::server::NamedService;
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health, HealthServer},
    server::{HealthReporter, HealthService},
};

use crate::{
    auth,
    database::{self, Database},
    error::{Cause, Chain},
    metrics::Gauge,
    proto::{
        auth::v1::auth_service_server::AuthServiceServer,
        todo::v1::todo_service_server::TodoServiceServer,
        user::v1::user_service_server::UserServiceServer,
    },
    todo, user,
};

/// How often the database is looked at. With [`CHECK_TIMEOUT`], an outage is told
/// within two seconds.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// How long a look may take before the database counts as away: most of the two seconds,
/// since one on a machine that is busy for a moment is slow, and there.
const CHECK_TIMEOUT: Duration = Duration::from_millis(1_400);

/// The names that need the database; `""` is the server as a whole.
const READINESS: [&str; 4] = [
    "",
    <AuthServiceServer<auth::service::AuthService> as NamedService>::NAME,
    <TodoServiceServer<todo::service::TodoService> as NamedService>::NAME,
    <UserServiceServer<user::service::UserService> as NamedService>::NAME,
];

/// The name that is SERVING as long as the process works, whatever the database does.
const LIVENESS: &str = "liveness";

/// Tells the health service what to say.
#[derive(Clone, Debug)]
pub struct Reporter {
    health: HealthReporter,
    /// What was said last of all that needs the database.
    is_ready: Arc<AtomicBool>,
    /// What the last look at the database found, 0 or 1.
    database_up: Gauge,
}

impl Reporter {
    /// All that needs the database is NOT_SERVING at first. Shows in `database_up` whether
    /// the database is.
    pub async fn new(database_up: Gauge) -> (Self, HealthServer<impl Health>) {
        let health = HealthReporter::new();
        let service = HealthServer::new(HealthService::from_health_reporter(health.clone()));
        let this = Self { health, is_ready: Arc::default(), database_up };
        this.report(false).await;
        this.health.set_service_status(LIVENESS, ServingStatus::Serving).await;
        (this, service)
    }

    /// Follows the database for ever, after it was reported to be ready, over a connection of
    /// its own: calls that wait for the others must not make the service look dead.
    pub async fn follow(self, database: Database) {
        let mut ticks = interval(CHECK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut connection = None;
        let mut was_ready = true;
        self.database_up.set(1);
        loop {
            ticks.tick().await;
            let looked = timeout(CHECK_TIMEOUT, check(&mut connection, &database)).await;
            let is_ready = looked.map_err(Cause::from).and_then(|looked| Ok(looked?));
            if let Err(cause) = &is_ready {
                connection = None;
                database.discard_idle();
                if was_ready {
                    tracing::warn!(cause = %Chain(&**cause), "the database does not answer");
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
        for name in READINESS {
            self.health.set_service_status(name, status).await;
        }
    }
}

/// A connection may have been closed since the last look, by a pooler or on the way. It is
/// the next one that tells whether the database is there.
async fn check(
    connection: &mut Option<PgConnection>,
    database: &Database,
) -> Result<bool, sqlx::Error> {
    if let Some(open) = connection {
        if let Ok(is_ready) = database::is_migrated(open).await {
            return Ok(is_ready);
        }
        // Those of calls most likely were, too.
        database.discard_idle();
    }
    let new = connection.insert(database.connect().await?);
    database::is_migrated(new).await
}
