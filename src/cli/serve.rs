//! `fast-zero serve`.

use std::{
    io::{self, Write},
    net::SocketAddr,
    pin::pin,
    process::ExitCode,
};

use tokio::{net::TcpListener, sync::oneshot, time::sleep};

use super::{ExitError, shutdown::Shutdown, source::DatabaseSource};
use crate::{
    config::{Config, connect_addr},
    server::Server,
    telemetry::log,
};

/// Serves until a signal. A second signal stops at once.
pub(super) async fn run(mut config: Config) -> Result<ExitCode, ExitError> {
    // Validate the settings before starting anything.
    config.validate()?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        commit = env!("FASTZERO_COMMIT"),
        "starting"
    );
    let shutdown = Shutdown::on_signals()?;
    let listen_addr = config.listen.grpc.listen_addr;
    let listener = TcpListener::bind(listen_addr).await.map_err(|error| {
        ExitError::Runtime(format!("cannot listen on LISTEN_ADDR {listen_addr}: {error}").into())
    })?;
    let server = Server::start(listener, &config).await?;
    let mut source = tokio::select! {
        source = DatabaseSource::open(&mut config.database) => source?,
        () = shutdown.requested.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    let result = match source.provide_secret_key(&mut config) {
        Ok(()) => serve(server, &config, &mut source, &shutdown).await,
        Err(error) => Err(error),
    };
    source.close().await;
    result
}

async fn serve(
    server: Server,
    config: &Config,
    source: &mut DatabaseSource,
    shutdown: &Shutdown,
) -> Result<ExitCode, ExitError> {
    let (on_ready, ready) = oneshot::channel();
    let on_ready = |address| {
        // Fails if the process is about to exit.
        let _ = on_ready.send(address);
    };
    let running = Box::pin(server.run(config, on_ready, shutdown.requested.clone()));
    let mut running = pin!(async {
        tokio::select! {
            ended = running => Ok(ended.map(|()| ExitCode::SUCCESS)?),
            () = shutdown.forced.cancelled() => Ok(ExitCode::FAILURE),
        }
    });
    tokio::select! {
        ended = &mut running => return ended,
        error = source.exited() => return Err(error),
        Ok(address) = ready => {
            if source.is_embedded() {
                tokio::spawn(print_after_log(quick_start(config, connect_addr(address))));
            }
        }
    }
    tokio::select! {
        ended = running => ended,
        error = source.exited() => Err(error),
    }
}

/// Returns a first call for a newcomer.
fn quick_start(config: &Config, address: SocketAddr) -> String {
    let file = config.tls.tls_cert_file.as_ref().filter(|file| !file.as_os_str().is_empty());
    let trust = file.map_or("-plaintext".to_owned(), |file| format!("-cacert {}", file.display()));
    format!(
        "\nfast-zero serves gRPC at {address} on an embedded PostgreSQL. Try:\n\n    \
         grpcurl {trust} -d '{{\"username\": \"ana\", \"email\": \"ana@example.com\", \
         \"password\": \"correct horse\"}}' {address} fastzero.user.v1.UserService/CreateUser\n"
    )
}

/// Prints a text after the lines of the log, which another thread writes.
async fn print_after_log(text: String) {
    sleep(2 * log::BATCH_WINDOW).await;
    // Standard output may be closed.
    let _ = writeln!(io::stdout(), "{text}");
}
