//! `fast-zero after-restore`: makes clients that follow changes start over, after the database was
//! restored or a failover has lost writes.

use std::process::ExitCode;

use clap::Args;

use super::{ExitError, source::DatabaseSource};
use crate::{
    config::{DatabaseConfig, LogConfig},
    database::{connect, incarnation},
    rpc::error::Error,
};

/// The arguments of the subcommand.
#[derive(Debug, Args)]
pub(super) struct AfterRestoreArgs {
    #[command(flatten)]
    pub(super) database: DatabaseConfig,
    #[command(flatten)]
    pub(super) log: LogConfig,
}

pub(super) async fn run(mut args: AfterRestoreArgs) -> Result<ExitCode, ExitError> {
    let source = DatabaseSource::open(&mut args.database).await?;
    let renewed = renew(&args.database).await;
    source.close().await;
    renewed.map(|()| ExitCode::SUCCESS)
}

async fn renew(config: &DatabaseConfig) -> Result<(), ExitError> {
    let (options, timeout) = (config.required_options()?, config.wait());
    let renewed = async {
        let mut connection = connect::connect_and_check(&options, timeout).await?;
        incarnation::renew(&mut connection).await
    };
    if renewed.await.map_err(Error::into_source)? {
        tracing::info!("cursors of earlier changes have expired");
    } else {
        tracing::info!("schema older than cursors, migration starts a new history");
    }
    Ok(())
}
