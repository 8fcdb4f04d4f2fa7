//! `fast-zero migrate`: applies the schema migrations.

use std::process::ExitCode;

use clap::Args;

use super::{ExitError, source::DatabaseSource};
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
    let source = DatabaseSource::open(&mut args.database).await?;
    let migrated = migrate(&args.database).await;
    source.close().await;
    migrated?;
    tracing::info!("schema is up to date");
    Ok(ExitCode::SUCCESS)
}

async fn migrate(config: &DatabaseConfig) -> Result<(), ExitError> {
    let (options, timeout) = (config.required_options()?, config.wait());
    let migrated = async {
        connect::connect_and_check(&options, timeout).await?;
        migrate::migrate(&options, timeout).await
    };
    Ok(migrated.await.map_err(Error::into_source)?)
}
