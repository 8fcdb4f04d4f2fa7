//! The `healthcheck` subcommand: asks a server how it is, as `grpc_health_probe` does.

use std::time::Duration;

use tokio_rustls::rustls::ClientConfig;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::tls;

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
pub async fn probe(address: &str, service: &str, tls: Option<ClientConfig>) -> Outcome {
    let Ok(Ok(channel)) = tokio::time::timeout(TIMEOUT, connect(address, tls)).await else {
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

async fn connect(
    address: &str,
    tls: Option<ClientConfig>,
) -> Result<Channel, tonic::transport::Error> {
    let Some(tls) = tls else {
        return Endpoint::from_shared(format!("http://{address}"))?.connect().await;
    };
    let endpoint = Endpoint::from_shared(format!("https://{address}"))?;
    endpoint.connect_with_connector(tls::connector(tls)).await
}
