//! `fast-zero postgres`: runs the embedded PostgreSQL alone.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{
    ExitError,
    embedded::{self, Options},
};
use crate::config::LogConfig;

/// The arguments of the subcommand.
#[derive(Debug, Args)]
pub(super) struct PostgresArgs {
    /// Stop when standard input closes, too
    #[arg(long)]
    lifeline: bool,

    /// Use a temporary data directory, and remove it at the end
    #[arg(long)]
    temporary: bool,

    /// Data directory [default: the user's data directory]
    #[arg(long, env)]
    fastzero_data_dir: Option<PathBuf>,

    #[command(flatten)]
    pub(super) log: LogConfig,
}

pub(super) fn run(args: PostgresArgs) -> Result<ExitCode, ExitError> {
    let PostgresArgs { lifeline, temporary, fastzero_data_dir: data_dir, .. } = args;
    embedded::run(&Options { data_dir, lifeline, temporary })?;
    Ok(ExitCode::SUCCESS)
}
