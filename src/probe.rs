//! The `healthcheck` subcommand: asks a server how it is, as `grpc_health_probe` does.

use std::time::Duration;

use tonic::transport::Endpoint;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// How long the connection, and then the answer, may take: what `grpc_health_probe`
/// allows.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What a probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The service is SERVING.
    Serving,
    /// Nobody answers at the address.
    NoConnection,
    /// The rpc failed, for instance because the service is unknown.
    RpcFailed,
    /// The service is not SERVING.
    NotServing,
}

/// Asks the server at `address` (`host:port`) how `service` is; `""` is the server as a
/// whole.
pub async fn probe(address: &str, service: &str) -> Outcome {
    let Ok(endpoint) = Endpoint::from_shared(format!("http://{address}")) else {
        return Outcome::NoConnection;
    };
    let endpoint = endpoint.connect_timeout(TIMEOUT);
    let Ok(Ok(channel)) = tokio::time::timeout(TIMEOUT, endpoint.connect()).await else {
        return Outcome::NoConnection;
    };
    let request = HealthCheckRequest { service: service.to_owned() };
    let mut client = HealthClient::new(channel);
    match tokio::time::timeout(TIMEOUT, client.check(request)).await {
        Ok(Ok(response)) if response.get_ref().status() == ServingStatus::Serving => {
            Outcome::Serving
        }
        Ok(Ok(_)) => Outcome::NotServing,
        Ok(Err(_)) | Err(_) => Outcome::RpcFailed,
    }
}
