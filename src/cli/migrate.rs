//! `fast-zero migrate`: applies the schema migrations.

use std::process::ExitCode;

use clap::Args;

use super::ExitError;
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

pub(super) async fn run(args: MigrateArgs) -> Result<ExitCode, ExitError> {
    let timeout = args.database.wait();
    #[cfg(feature = "embedded")]
    let (options, embedded) = if let Some(options) = args.database.connect_options()? {
        (options, None)
    } else {
        use secrecy::ExposeSecret;

        let data_dir = args.database.fastzero_data_dir.as_deref();
        let postgres = super::embedded::start(data_dir).await?;
        (connect::parse_url(postgres.url().expose_secret())?, Some(postgres))
    };
    #[cfg(not(feature = "embedded"))]
    let options = args.database.connect_options()?;
    #[cfg(not(feature = "embedded"))]
    let options = options.ok_or_else(|| crate::config::ConfigError::missing("DATABASE_URL"))?;
    let migrated = async {
        connect::connect_and_check(&options, timeout).await?;
        migrate::migrate(&options, timeout).await
    };
    let migrated = migrated.await.map_err(Error::into_source);
    #[cfg(feature = "embedded")]
    if let Some(postgres) = embedded {
        postgres.stop().await;
    }
    migrated?;
    tracing::info!("schema is up to date");
    Ok(ExitCode::SUCCESS)
}
