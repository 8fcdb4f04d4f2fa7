//! Watching the health service.

use tonic::{Status, Streaming, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus,
    health_client::HealthClient,
};

use super::App;

/// An open Watch.
pub struct Watch(pub Streaming<HealthCheckResponse>);

impl App {
    /// Watches a service.
    pub async fn watch(&self, service: &str) -> Watch {
        Watch::begin(&self.channel, service).await
    }
}

impl Watch {
    pub async fn begin(channel: &Channel, service: &str) -> Self {
        let request = HealthCheckRequest { service: service.to_owned() };
        let mut client = HealthClient::new(channel.clone());
        Self(client.watch(request).await.expect("a known service").into_inner())
    }

    pub async fn until_serving(&mut self) {
        self.until(ServingStatus::Serving).await;
    }

    pub async fn until_not_serving(&mut self) {
        self.until(ServingStatus::NotServing).await;
    }

    /// Waits until the server ends the stream, which may be an error.
    pub async fn until_ended(&mut self) -> Option<Status> {
        loop {
            match self.0.message().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(status) => return Some(status),
            }
        }
    }

    async fn until(&mut self, status: ServingStatus) {
        while let Some(response) = self.0.message().await.expect("the stream goes on") {
            if response.status() == status {
                return;
            }
        }
        panic!("the stream ended before {status:?}");
    }
}
