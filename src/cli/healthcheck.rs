//! `fast-zero healthcheck`: checks the health of a server, as `grpc_health_probe` does.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use tokio::time::timeout;
use tokio_rustls::rustls::ClientConfig;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{ExitError, print_error};
use crate::{
    config::{GrpcAddrConfig, LogConfig, TlsConfig, connect_addr},
    transport::tls,
    types::{
        error_chain::BoxError,
        secret_text::{HIDDEN, may_be_secret},
    },
};

/// How long the connection, and then the response, may take: the default of
/// `grpc_health_probe`.
///
/// Test: `the_healthcheck_of_a_silent_server_ends_after_a_second`.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What to do if no server answers at the address of the settings.
const HINT: &str = " (the address of LISTEN_ADDR; if the server has another one, pass --addr)";

/// The arguments of the subcommand.
#[derive(Debug, Args)]
pub(super) struct HealthcheckArgs {
    /// Address of the server, host:port [default: the one of LISTEN_ADDR]
    #[arg(long)]
    addr: Option<String>,

    /// Service to check [default: the server as a whole]
    #[arg(long, default_value = "", hide_default_value = true)]
    service: String,

    /// Certificate to present to a server with TLS_CLIENT_CA_FILE, in PEM [default: TLS_CERT_FILE]
    #[arg(long, requires = "key")]
    cert: Option<PathBuf>,

    /// Private key of that certificate, in PEM
    #[arg(long, requires = "cert")]
    key: Option<PathBuf>,

    #[command(flatten)]
    grpc: GrpcAddrConfig,
    #[command(flatten)]
    tls: TlsConfig,
    #[command(flatten)]
    pub(super) log: LogConfig,
}

/// The result of a check.
#[derive(Debug)]
enum ProbeOutcome {
    Serving,
    NotServing,
    RpcFailed(Status),
    NoConnection(BoxError),
}

impl fmt::Display for ProbeOutcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serving => formatter.write_str("SERVING"),
            Self::NotServing => formatter.write_str("NOT_SERVING"),
            Self::RpcFailed(status) => {
                let code = crate::telemetry::metrics::code_name(status.code());
                write!(formatter, "{code}: {}", status.message())
            }
            Self::NoConnection(error) => {
                let error = crate::types::error_chain::ErrorChain(&**error);
                write!(formatter, "cannot connect: {error}")
            }
        }
    }
}

/// Returns the addresses at which the server may answer. A server that listens on all addresses
/// of IPv6 also has those of IPv4, and only them where IPv6 is disabled.
fn addresses(listen_addr: SocketAddr) -> Vec<String> {
    let mut addresses = vec![connect_addr(listen_addr)];
    if listen_addr.ip() == Ipv6Addr::UNSPECIFIED {
        addresses.push((Ipv4Addr::LOCALHOST, listen_addr.port()).into());
    }
    addresses.iter().map(SocketAddr::to_string).collect()
}

/// Checks a server. Reports on standard error what is not SERVING, and exits as
/// `grpc_health_probe` does.
pub(super) async fn run(args: HealthcheckArgs) -> Result<ExitCode, ExitError> {
    let (addresses, hint) = match args.addr {
        Some(address) => (vec![address], ""),
        None => (addresses(args.grpc.listen_addr), HINT),
    };
    let tls = args.tls.client_config(args.cert.zip(args.key))?;
    let mut outcome = ProbeOutcome::NoConnection("no address".into());
    let mut errors = Vec::new();
    for address in addresses {
        outcome = check(&address, &args.service, tls.clone()).await;
        let address = if may_be_secret(&address) { HIDDEN } else { &address };
        if !matches!(outcome, ProbeOutcome::NoConnection(_)) {
            errors.push(format!("{address}: {outcome}"));
            break;
        }
        errors.push(format!("{address}: {outcome}{hint}"));
    }
    if !matches!(outcome, ProbeOutcome::Serving) {
        for error in &errors {
            print_error(error);
        }
    }
    Ok(ExitCode::from(match outcome {
        ProbeOutcome::Serving => 0,
        ProbeOutcome::NoConnection(_) => 2,
        ProbeOutcome::RpcFailed(_) => 3,
        ProbeOutcome::NotServing => 4,
    }))
}

async fn check(address: &str, service: &str, tls: Option<ClientConfig>) -> ProbeOutcome {
    let channel = match timeout(TIMEOUT, connect(address, tls)).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => return ProbeOutcome::NoConnection(error.into()),
        Err(_) => return ProbeOutcome::NoConnection("timed out".into()),
    };
    let request = HealthCheckRequest { service: service.to_owned() };
    let mut client = HealthClient::new(channel);
    match timeout(TIMEOUT, client.check(request)).await {
        Ok(Ok(response)) if response.get_ref().status() == ServingStatus::Serving => {
            ProbeOutcome::Serving
        }
        Ok(Ok(_)) => ProbeOutcome::NotServing,
        Ok(Err(status)) => ProbeOutcome::RpcFailed(status),
        Err(_) => ProbeOutcome::RpcFailed(Status::new(Code::DeadlineExceeded, "timed out")),
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
