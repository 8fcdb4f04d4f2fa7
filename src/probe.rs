//! The `healthcheck` subcommand: asks a server how it is, as `grpc_health_probe` does.

use std::{io, sync::Arc, time::Duration};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tonic::transport::{Channel, Endpoint};
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
    let tls = TlsConnector::from(Arc::new(tls));
    let connector = tower::service_fn(move |uri| connect_with_tls(uri, tls.clone()));
    let endpoint = Endpoint::from_shared(format!("https://{address}"))?;
    endpoint.connect_with_connector(connector).await
}

async fn connect_with_tls(
    uri: Uri,
    tls: TlsConnector,
) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?;
    Ok(TokioIo::new(tls.connect(name, stream).await?))
}
