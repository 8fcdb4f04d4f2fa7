//! The containers: the image, the stack that compose starts, and the one with replicas.
//!
//! The tests need a Docker engine and build the image, so they run only on request:
//! `cargo test compose:: -- --ignored`.

mod configuration;
mod dotenv;
mod image;
mod load_balancing;
mod operators;
mod readme;
mod stack;
mod upgrade;

use std::time::{Duration, Instant};

use fast_zero::proto::auth::v1::LoginRequest;
use tonic::Status;

use crate::support::{
    PASSWORD,
    compose::{combined_output, docker_command, run_command},
};

const BASE: &str = "compose.yaml";
const REPLICAS: &str = "deploy/compose.replicas.yaml";
const SECRETS: &str = "deploy/compose.secrets.yaml";
const TLS: &str = "deploy/compose.tls.yaml";
const TESTS: &str = "deploy/compose.tests.yaml";

/// The section of `docs/deployment.md` on upgrades of PostgreSQL.
const UPGRADES: &str = "PostgreSQL upgrades";

const APP: &str = "fastzero_app";
const DATABASE: &str = "fastzero_database";

/// The maximum time of a call: its deadline of 5 s, plus the network.
const MAX_CALL_TIME: Duration = Duration::from_millis(5_500);

/// Asserts that the call completes in time, and returns its result.
async fn timed<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let started = Instant::now();
    let response = call.await;
    assert!(started.elapsed() < MAX_CALL_TIME, "{:?}", started.elapsed());
    response
}

fn login(login: &str) -> LoginRequest {
    LoginRequest { login: login.to_owned(), password: PASSWORD.to_owned() }
}

async fn docker_logs(container: &str) -> String {
    // The service logs to standard error.
    combined_output(&run_command(docker_command(&["logs", container])).await)
}
