//! Clients of the health service.

use tonic::{Status, Streaming, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

use super::{App, RpcResult, wait::with_timeout};

/// The names whose status depends on the database.
pub const READINESS_SERVICES: [&str; 4] = [
    "",
    "fastzero.auth.v1.AuthService",
    "fastzero.todo.v1.TodoService",
    "fastzero.user.v1.UserService",
];
/// The name whose status does not depend on the database.
pub const LIVENESS_SERVICE: &str = "liveness";

pub async fn try_check_health(channel: &Channel, service: &str) -> RpcResult<HealthCheckResponse> {
    let request = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(channel.clone()).check(request).await
}

pub async fn check_health(channel: &Channel, service: &str) -> ServingStatus {
    try_check_health(channel, service).await.expect("a known service").into_inner().status()
}

/// Watches each service whose status depends on the database, and waits until it is SERVING.
pub async fn watch_readiness(app: &App) -> Vec<Watch> {
    let mut watches = Vec::new();
    for service in READINESS_SERVICES {
        let mut watch = app.watch(service).await;
        with_timeout("SERVING", watch.wait_until_serving()).await;
        watches.push(watch);
    }
    watches
}

/// An open stream of `Watch`.
pub struct Watch(pub Streaming<HealthCheckResponse>);

impl App {
    /// Watches a service.
    pub async fn watch(&self, service: &str) -> Watch {
        Watch::start(&self.channel, service).await
    }
}

impl Watch {
    pub async fn start(channel: &Channel, service: &str) -> Self {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut client = HealthClient::new(channel.clone());
        Self(client.watch(request).await.expect("a known service").into_inner())
    }

    pub async fn wait_until_serving(&mut self) {
        self.wait_until(ServingStatus::Serving).await;
    }

    pub async fn wait_until_not_serving(&mut self) {
        self.wait_until(ServingStatus::NotServing).await;
    }

    /// Waits until the server ends the stream, and returns the error if it ends with one.
    pub async fn wait_until_ended(&mut self) -> Option<Status> {
        loop {
            match self.0.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    }

    async fn wait_until(&mut self, status: ServingStatus) {
        while let Some(response) = self.0.message().await.expect("the stream is open") {
            if response.status() == status {
                return;
            }
        }
        panic!("the stream ended before {status:?}");
    }
}
