//! `fast-zero migrate`: applies the schema migrations.

use std::process::ExitCode;

use clap::Args;

use super::{
    ExitError,
    shutdown::{Signals, StopSignal},
    source::DatabaseSource,
};
use crate::{
    config::{DatabaseConfig, LogConfig},
    database::{connect, migrate},
    rpc::error::Error,
};

/// The arguments of the subcommand.
#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    #[command(flatten)]
    pub(super) database: DatabaseConfig,
    #[command(flatten)]
    pub(super) log: LogConfig,
}

pub(super) async fn run(mut args: MigrateArgs) -> Result<ExitCode, ExitError> {
    args.database.read_files()?;
    let mut signals = Signals::listen()?;
    let source = tokio::select! {
        source = DatabaseSource::open(&mut args.database) => source?,
        signal = signals.next() => return Ok(stop(signal)),
    };
    // A migration that is dropped is rolled back: each is a transaction.
    let migrated = tokio::select! {
        migrated = migrate(&args.database) => migrated.map(|()| ExitCode::SUCCESS),
        signal = signals.next() => Ok(stop(signal)),
    };
    source.close().await;
    migrated
}

fn stop(signal: StopSignal) -> ExitCode {
    tracing::warn!(signal = signal.name, "migration stopped");
    signal.exit_code()
}

async fn migrate(config: &DatabaseConfig) -> Result<(), ExitError> {
    let (options, timeout) = (config.required_options()?, config.wait());
    let migrated = async {
        connect::connect_and_check(&options, timeout).await?;
        migrate::migrate(&options, timeout).await
    };
    migrated.await.map_err(Error::into_source)?;
    tracing::info!("schema is up to date");
    Ok(())
}
