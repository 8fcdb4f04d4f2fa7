//! The server and the PostgreSQL that the tests kill.

use std::path::PathBuf;

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tonic::transport::Channel;

use super::{Target, worker::Worker};
use crate::support::{
    app::connect,
    embedded::{Postgres, temp_dir},
    process::{Binary, Process},
    wait::wait_until,
};

/// The real binary on its own durable PostgreSQL.
pub(super) struct Service {
    pub(super) instance_dir: PathBuf,
    /// `None` while it is killed.
    pub(super) postgres: Option<Postgres>,
    pub(super) server: Process,
    pub(super) channel: Channel,
    pub(super) _dir: TempDir,
}

pub(super) fn start_server(url: &str) -> Process {
    Binary::server(url).env("RUST_LOG", "warn,fast_zero::server=info").start()
}

pub(super) async fn channel_to(server: &Process) -> Channel {
    connect(server.address().await.parse().expect("an address")).await
}

impl Service {
    pub(super) async fn start() -> Self {
        let dir = temp_dir();
        let instance_dir = dir.path().join("data");
        let postgres = Postgres::start(&instance_dir);
        let server = start_server(&postgres.url);
        let channel = channel_to(&server).await;
        Self { instance_dir, postgres: Some(postgres), server, channel, _dir: dir }
    }

    pub(super) fn postgres(&self) -> &Postgres {
        self.postgres.as_ref().expect("a running process")
    }

    pub(super) fn kill(&mut self, target: Target) {
        if target != Target::Server {
            self.postgres.take().expect("a running process").crash(&self.instance_dir);
        }
        if target != Target::Postgres {
            self.server.signal(Signal::SIGKILL);
        }
    }

    /// Restarts the killed processes, and waits until a call of the worker succeeds.
    pub(super) async fn restart(&mut self, target: Target, worker: &Worker) {
        if target != Target::Server {
            self.postgres = Some(Postgres::start(&self.instance_dir));
        }
        if target != Target::Postgres {
            self.server.wait().await;
            self.assert_no_error_logged();
            self.wait_until_disconnected().await;
            self.server = start_server(&self.postgres().url);
            self.channel = channel_to(&self.server).await;
        }
        let client = worker.client.clone().with_channel(&self.channel);
        wait_until("a call succeeds", async || client.try_get_user("me").await.is_ok()).await;
        self.assert_no_error_logged();
    }

    /// PostgreSQL may still run the last statements of the killed server.
    pub(super) async fn wait_until_disconnected(&self) {
        let connected = "select exists (
            select from pg_stat_activity where application_name = 'fast-zero'
        )::text";
        wait_until("PostgreSQL closes the connections", async || {
            self.postgres().fetch_scalar(connected).await == "false"
        })
        .await;
    }

    /// Asserts that no error is logged. An unavailable database is a warning.
    pub(super) fn assert_no_error_logged(&self) {
        let output = self.server.output();
        assert!(!output.contains("\"level\":\"ERROR\""), "{output}");
    }
}
