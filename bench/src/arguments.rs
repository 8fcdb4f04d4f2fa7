//! The command line.

use std::{ffi::OsString, path::PathBuf};

use clap::{Parser, Subcommand, ValueEnum, value_parser};

/// The settings of the service.
pub use fast_zero::Config;

/// Measures fast-zero and compares it with a baseline: a bare server with the same SQL statements.
///
/// docs/performance.md describes what is measured. Settings of the service in the
/// environment apply to all servers.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Arguments {
    /// Run everything once, on a small dataset: checks that it works, not how fast it is
    #[arg(long)]
    pub quick: bool,

    /// Run these benchmarks only
    #[arg(long, value_delimiter = ',', value_name = "BENCHMARKS")]
    pub only: Vec<Benchmark>,

    /// Number of rounds. Each round runs every benchmark once
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u16).range(1..=100))]
    pub rounds: u16,

    /// Duration of each measurement in seconds, after a warm-up of a quarter of it
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u16).range(1..=600))]
    pub seconds: u16,

    /// Number of client connections
    #[arg(long, default_value_t = 8, value_parser = value_parser!(u16).range(1..=1000))]
    pub connections: u16,

    /// Number of calls in flight on each connection
    #[arg(long, default_value_t = 8, value_parser = value_parser!(u16).range(1..=128))]
    pub in_flight: u16,

    /// Number of users in the database
    #[arg(long, default_value_t = 1_000, value_parser = value_parser!(u32).range(200..=1_000_000))]
    pub users: u32,

    /// Number of todos in the database
    #[arg(long, default_value_t = 1_000_000, value_parser = value_parser!(u32).range(10_000..=10_000_000))]
    pub todos: u32,

    /// Directory for the report and the plot
    #[arg(long, default_value = "target/bench")]
    pub output: PathBuf,

    /// Binary of the service. By default, it is built with the profile of this program
    #[arg(long, value_name = "PATH")]
    pub server: Option<PathBuf>,

    /// Another fast-zero binary, for example of an earlier commit, to compare with
    ///
    /// Each round of each call benchmark (get to sign-up) also measures this binary as
    /// "previous", right before or right after the service; the order alternates between
    /// rounds. The report adds the ratios of rate, CPU and memory.
    ///
    /// Build the binary with the same profile and with `--features jemalloc`. It must work
    /// with the schema of the service and return the same responses.
    #[arg(long, value_name = "PATH")]
    pub against: Option<PathBuf>,

    /// Measure "previous" with access tokens that are signed with HS256
    ///
    /// Without `--against`, this compares the service with itself: EdDSA, the default, with HS256.
    /// With `--against`, the binary may be of a release that does not know EdDSA.
    #[arg(long)]
    pub against_hs256: bool,

    /// PostgreSQL server to create and drop databases in. By default, the service's binary starts an embedded one
    #[arg(long = "database-url", env = "DATABASE_URL", hide_env_values = true, value_name = "URL")]
    pub postgres: Option<String>,

    #[command(subcommand)]
    pub internal: Option<InternalCommand>,
}

/// The commands that this program starts itself with.
#[derive(Debug, Subcommand)]
pub enum InternalCommand {
    /// Serves the baseline
    #[command(hide = true)]
    Baseline(Box<Settings>),
    /// Executes a program that ends with its parent
    #[command(hide = true)]
    ExecWithParent {
        parent: i32,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 1..)]
        command: Vec<OsString>,
    },
}

/// The settings of the service, read from the environment.
#[derive(Debug, Parser)]
pub struct Settings {
    #[command(flatten)]
    pub config: Config,
}

/// A benchmark, as named on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Benchmark {
    /// GetTodo
    Get,
    /// ListTodos, first page of 10 todos
    List,
    /// ListTodos, first page of 10 todos that match a title filter
    Filter,
    /// CreateTodo
    Create,
    /// UpdateTodo of the state
    Update,
    /// A mix of 60 % GetTodo, 20 % ListTodos, 10 % CreateTodo and 10 % UpdateTodo
    Mixed,
    /// Login
    Login,
    /// RefreshToken
    Refresh,
    /// CreateUser
    SignUp,
    /// GetTodo with one call in flight
    Latency,
    /// ListTodos with all todos in the table, and with 1000
    Growth,
    /// ListTodos, page 10,000 and page 1 of a long list
    Pages,
    /// ListTodos with a title filter that matches none of an owner's 100,000 todos
    Contains,
    /// Memory with 1000 connections
    Memory,
    /// Lag of WatchTodos, with 1000 watches on each of two replicas and 200 UpdateTodo calls a second
    Watch,
    /// Startup and shutdown time, idle memory, and binary size
    Start,
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_binary_to_compare_with_is_optional() {
        let against = |arguments: &[&str]| {
            Arguments::try_parse_from(["bench"].iter().chain(arguments)).expect("valid").against
        };
        assert_eq!(against(&[]), None);
        assert_eq!(against(&["--against", "old"]).as_deref(), Some(Path::new("old")));
    }

    #[test]
    fn benchmarks_are_separated_by_commas() {
        let arguments = Arguments::try_parse_from(["bench", "--only", "get,sign-up"]);
        assert_eq!(arguments.expect("valid").only, [Benchmark::Get, Benchmark::SignUp]);
    }
}
