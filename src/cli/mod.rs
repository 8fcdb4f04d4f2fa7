//! The command line: arguments, one file for each subcommand, and exit codes.

mod after_restore;
#[cfg(feature = "embedded")]
mod embedded;
mod healthcheck;
mod methods;
mod migrate;
#[cfg(feature = "embedded")]
mod postgres;
mod serve;
mod server_flags;
mod shutdown;
mod source;
mod user;

use std::{
    any::TypeId,
    env,
    ffi::{OsStr, OsString},
    fmt,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use clap::{
    Arg, ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand,
    builder::Resettable,
    error::{ContextKind, ContextValue, ErrorKind},
};

use self::{
    after_restore::AfterRestoreArgs, healthcheck::HealthcheckArgs, migrate::MigrateArgs,
    user::UserArgs,
};
use crate::{
    config::{Config, ConfigError, LogConfig, dotenv},
    database::url,
    telemetry::log,
    types::{
        error_chain::{BoxError, ErrorChain},
        secret_text::{HIDDEN, may_be_secret},
    },
};

/// Users, authentication and todos over gRPC, on PostgreSQL.
///
/// Each option is also an environment variable of the same name, and a line of a file `.env` in
/// the working directory. An option comes before a variable, and a variable before the file.
#[derive(Debug, Parser)]
#[command(name = "fast-zero", version = VERSION, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    config: Config,
    #[command(subcommand)]
    command: Option<Command>,
}

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("FASTZERO_COMMIT"), ")");

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve gRPC (the default)
    Serve(Box<Config>),
    /// Apply schema migrations, and exit
    Migrate(Box<MigrateArgs>),
    /// Make clients that follow changes start over, after a restore of the database, and exit
    AfterRestore(Box<AfterRestoreArgs>),
    /// Check the health of a server: exits with 0 if it is SERVING, 2 if it cannot connect, 3 if the RPC fails, 4 if it is not SERVING
    Healthcheck(Box<HealthcheckArgs>),
    /// Print the methods of the API, and who may call them
    Methods,
    /// List, show, disable, enable and delete users, and reset their passwords
    User(Box<UserArgs>),
    /// Run the embedded PostgreSQL alone: print its URL, and stay until a signal
    #[cfg(feature = "embedded")]
    Postgres(Box<postgres::PostgresArgs>),
}

/// Why the process exits, by exit code (sysexits.h).
enum ExitError {
    /// 64, or 78 for the value of a setting.
    Usage(clap::Error),
    /// 78.
    Config(BoxError),
    /// 1.
    Runtime(BoxError),
}

impl From<ConfigError> for ExitError {
    fn from(error: ConfigError) -> Self {
        Self::Config(error.into())
    }
}

impl From<dotenv::DotenvError> for ExitError {
    fn from(error: dotenv::DotenvError) -> Self {
        Self::Config(error.into())
    }
}

impl From<BoxError> for ExitError {
    fn from(error: BoxError) -> Self {
        match error.downcast::<ConfigError>() {
            Ok(error) => Self::Config(error),
            Err(error) => Self::Runtime(error),
        }
    }
}

#[cfg(feature = "embedded")]
impl From<embedded::Error> for ExitError {
    fn from(error: embedded::Error) -> Self {
        Self::Runtime(error.into())
    }
}

impl From<io::Error> for ExitError {
    fn from(error: io::Error) -> Self {
        Self::Runtime(error.into())
    }
}

impl ExitError {
    /// Prints the error, and returns the exit code.
    fn report(self) -> ExitCode {
        match self {
            Self::Usage(error) => {
                let error = without_secrets(error);
                // Standard error may be closed.
                let _ = error.print();
                ExitCode::from(match error.kind() {
                    ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
                    ErrorKind::InvalidValue | ErrorKind::ValueValidation => 78,
                    _ => 64,
                })
            }
            Self::Config(error) => {
                print_error(&ErrorChain(&*error));
                ExitCode::from(78)
            }
            Self::Runtime(error) => {
                print_error(&ErrorChain(&*error));
                ExitCode::FAILURE
            }
        }
    }
}

/// Hides the value that an error of the command line names, if it may be secret.
fn without_secrets(mut error: clap::Error) -> clap::Error {
    let kinds =
        [ContextKind::InvalidValue, ContextKind::InvalidArg, ContextKind::InvalidSubcommand];
    for kind in kinds {
        if matches!(error.get(kind), Some(ContextValue::String(text)) if may_be_secret(text)) {
            error.insert(kind, ContextValue::String(HIDDEN.to_owned()));
        }
    }
    error
}

/// Prints to standard error, which may be closed.
fn print_error(error: &dyn fmt::Display) {
    let _ = writeln!(io::stderr(), "error: {error}");
}

/// Runs the subcommand of the command line, and returns the exit code of the process.
#[must_use]
pub fn run() -> ExitCode {
    try_run().unwrap_or_else(ExitError::report)
}

fn try_run() -> Result<ExitCode, ExitError> {
    let Arguments { config, command } = read_arguments()?;
    match command.unwrap_or_else(|| Command::Serve(Box::new(config))) {
        Command::Serve(config) => with_log(config.log.clone(), || block_on(serve::run(*config))),
        Command::Migrate(args) => with_log(args.log.clone(), || block_on(migrate::run(*args))),
        Command::AfterRestore(args) => {
            with_log(args.log.clone(), || block_on(after_restore::run(*args)))
        }
        Command::Healthcheck(args) => {
            with_log(args.log.clone(), || block_on(healthcheck::run(*args)))
        }
        Command::User(args) => with_log(args.log(), || block_on(user::run(*args))),
        Command::Methods => Ok(methods::run().map(|()| ExitCode::SUCCESS)?),
        // Has a runtime of its own, which starts after it has switched the user.
        #[cfg(feature = "embedded")]
        Command::Postgres(args) => with_log(args.log.clone(), || postgres::run(*args)),
    }
}

fn with_log(
    config: LogConfig,
    run: impl FnOnce() -> Result<ExitCode, ExitError>,
) -> Result<ExitCode, ExitError> {
    let _log = log::init(config.rust_log, config.log_format);
    run()
}

/// Reads the settings. `--help` and `--version` end the first parse, which also reports what is
/// invalid on the command line and in the environment. Only then the file `.env` is read, as far
/// as the subcommand has settings.
fn read_arguments() -> Result<Arguments, ExitError> {
    let mut args: Vec<_> = env::args_os().collect();
    let matches = parse_arguments(args.clone()).map_err(ExitError::Usage)?;
    let command = Arguments::command();
    let (mut command, mut subcommand, mut own) = (&command, "", &matches);
    while let Some((name, matches)) = own.subcommand() {
        (subcommand, own) = (name, matches);
        command = command.find_subcommand(name).unwrap_or(command);
    }
    let settings: Vec<_> = command.get_arguments().filter_map(Arg::get_env).collect();
    let has_database = settings.contains(&OsStr::new("DATABASE_URL"));
    dotenv::load(
        |name| env::var_os(name),
        |name| settings.contains(&OsStr::new(name)) || (has_database && url::is_variable(name)),
    )?;
    if subcommand == "healthcheck" && !own.contains_id("addr") {
        let server = server_flags::server_beside(|args| parse_arguments(args).ok());
        let flags = server.map(|server| server_flags::known_to(command, own, &server));
        args.extend(flags.unwrap_or_default());
    }
    let matches = parse_arguments(args).map_err(ExitError::Usage)?;
    Arguments::from_arg_matches(&matches).map_err(ExitError::Usage)
}

/// An empty variable counts as not set: compose passes an unset one as an empty one. Without a
/// subcommand, the options are those of `serve`; with one, their variables are not read.
fn parse_arguments(mut args: Vec<OsString>) -> Result<ArgMatches, clap::Error> {
    let mut command = without_empty(Arguments::command());
    let names = move_subcommands_first(&command, &mut args);
    if names > 0 {
        command = command.mut_args(|arg| arg.env(Resettable::Reset));
    }
    let subcommand = args[1..=names].iter().try_fold(&command, clap::Command::find_subcommand);
    let not_text = subcommand.unwrap_or(&command).get_arguments().find(|arg| {
        let is_path = arg.get_value_parser().type_id() == TypeId::of::<PathBuf>();
        !is_path && value_of(arg).is_some_and(|value| value.to_str().is_none())
    });
    let not_text = not_text.and_then(Arg::get_env).map(OsStr::to_owned);
    let is_text = args.iter().all(|arg| arg.to_str().is_some());
    command.try_get_matches_from(args).map_err(|error| match (error.kind(), not_text) {
        (ErrorKind::InvalidUtf8, Some(name)) if is_text => {
            let message = format!("{} must be UTF-8 text\n", name.display());
            clap::Error::raw(ErrorKind::ValueValidation, message)
        }
        _ => error,
    })
}

fn value_of(arg: &Arg) -> Option<OsString> {
    arg.get_env().and_then(env::var_os)
}

/// Makes a command, and those below it, ignore empty variables.
fn without_empty(command: clap::Command) -> clap::Command {
    let command = command.mut_args(|arg| match value_of(&arg) {
        Some(value) if value.is_empty() => arg.env(Resettable::Reset),
        // The help shows the values of variables.
        Some(value) if may_be_secret(&value.to_string_lossy()) => arg.hide_env_values(true),
        _ => arg,
    });
    command.mut_subcommands(without_empty)
}

/// Moves the names of subcommands before the options that precede them: a subcommand accepts those
/// that it knows. Returns the number of the names.
fn move_subcommands_first(root: &clap::Command, args: &mut [OsString]) -> usize {
    let (mut command, mut names) = (root, 0);
    while let Some(index) = subcommand_index(root, command, args, names + 1) {
        names += 1;
        args[names..=index].rotate_right(1);
        match command.find_subcommand(&args[names]) {
            Some(subcommand) => command = subcommand,
            None => break,
        }
    }
    names
}

/// Returns the index of the next subcommand, if only options of settings, or of the subcommands,
/// precede it.
fn subcommand_index(
    root: &clap::Command,
    command: &clap::Command,
    args: &[OsString],
    mut index: usize,
) -> Option<usize> {
    let is_subcommand =
        |arg: &OsStr| command.get_subcommands().any(|subcommand| arg == subcommand.get_name());
    // Without a subcommand, the options are those of the server.
    let of_subcommands =
        command.get_subcommands().filter(|_| command.get_name() != root.get_name());
    let options: Vec<_> = std::iter::once(root)
        .chain(of_subcommands)
        .flat_map(clap::Command::get_arguments)
        .filter(|option| !option.is_positional())
        .collect();
    loop {
        let arg = args.get(index)?;
        if is_subcommand(arg) {
            return Some(index);
        }
        let name = arg.to_str()?.strip_prefix("--")?;
        let (name, has_value) =
            name.split_once('=').map_or((name, false), |(name, _)| (name, true));
        let option = options.iter().find(|option| option.get_long() == Some(name))?;
        // A flag of a setting that is true or false may stand without a value.
        let is_optional = option.get_num_args().is_some_and(|number| number.min_values() == 0);
        let takes_value = option.get_action().takes_values();
        let next = args.get(index + 1)?;
        let is_option = next.as_encoded_bytes().starts_with(b"--");
        let takes_next =
            !has_value && takes_value && !(is_optional && (is_option || is_subcommand(next)));
        index += 1 + usize::from(takes_next);
    }
}

fn block_on(
    work: impl Future<Output = Result<ExitCode, ExitError>>,
) -> Result<ExitCode, ExitError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    // A hash in progress does not delay the exit.
    runtime.shutdown_background();
    result
}
