//! The command line.

use std::{ffi::OsString, path::PathBuf};

use clap::{Parser, Subcommand, ValueEnum, value_parser};
use fast_zero::config::Config;

use crate::scenario::Scenario;

/// Measures fast-zero next to the floor: a bare server with the same statements.
///
/// What is measured, and what not, is told in docs/performance.md. Settings of the service
/// that are in the environment hold for both servers.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Arguments {
    /// Everything once, and small: whether it works, not how fast it is
    #[arg(long)]
    pub quick: bool,

    /// Only these parts
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<Part>,

    /// How often everything is measured, in turns
    #[arg(long, default_value_t = 5, value_parser = value_parser!(u16).range(1..=100))]
    pub rounds: u16,

    /// How long each measurement takes, in seconds, after a quarter of it to warm up
    #[arg(long, default_value_t = 3, value_parser = value_parser!(u16).range(1..=600))]
    pub seconds: u16,

    /// Connections of callers
    #[arg(long, default_value_t = 8, value_parser = value_parser!(u16).range(1..=1000))]
    pub connections: u16,

    /// Calls under way on each connection
    #[arg(long, default_value_t = 8, value_parser = value_parser!(u16).range(1..=128))]
    pub in_flight: u16,

    /// Users in the database
    #[arg(long, default_value_t = 1_000, value_parser = value_parser!(u32).range(200..=1_000_000))]
    pub users: u32,

    /// To-dos in the database
    #[arg(long, default_value_t = 1_000_000, value_parser = value_parser!(u32).range(10_000..=10_000_000))]
    pub todos: u32,

    /// Where the report and the plot are written
    #[arg(long, default_value = "target/bench")]
    pub output: PathBuf,

    /// The service's binary; by default it is built, with the profile that this is built with
    #[arg(long)]
    pub server: Option<PathBuf>,

    /// PostgreSQL to use, in which a database is made and dropped; without it, the private one of the service's binary
    #[arg(long = "database-url", env = "DATABASE_URL", hide_env_values = true)]
    pub postgres: Option<String>,

    #[command(subcommand)]
    pub internal: Option<Internal>,
}

/// What this program starts itself as.
#[derive(Debug, Subcommand)]
pub enum Internal {
    /// The floor
    #[command(hide = true)]
    Floor(Box<Settings>),
    /// A program that ends when the process with this number does
    #[command(hide = true)]
    Leashed {
        parent: i32,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 1..)]
        command: Vec<OsString>,
    },
}

/// The settings of the service, from the environment.
#[derive(Debug, Parser)]
pub struct Settings {
    #[command(flatten)]
    pub config: Config,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// GetTodo
    Get,
    /// ListTodos, the first 10
    List,
    /// ListTodos, the first 10 of those whose title contains a word
    Filter,
    /// CreateTodo
    Create,
    /// UpdateTodo of the state
    Update,
    /// 6 GetTodo, 2 ListTodos, 1 CreateTodo, 1 UpdateTodo in 10
    Mixed,
    /// Login
    Login,
    /// RefreshToken
    Refresh,
    /// CreateUser
    SignUp,
    /// GetTodo with one call in flight
    Latency,
    /// ListTodos, whatever is in the table: with all to-dos, and with 1000
    Growth,
    /// ListTodos, far into a list: page 10 000, and page 1
    Pages,
    /// ListTodos of an owner of 100 000, none of which contains what is looked for
    Contains,
    /// Memory with 1000 connections
    Memory,
    /// Start, stop, memory without calls, and the size of the binary
    Start,
}

impl Part {
    /// The scenario that it is, if it is one.
    pub fn scenario(self) -> Option<Scenario> {
        Some(match self {
            Self::Get => Scenario::Get,
            Self::List => Scenario::List,
            Self::Filter => Scenario::Filter,
            Self::Create => Scenario::Create,
            Self::Update => Scenario::Update,
            Self::Mixed => Scenario::Mixed,
            Self::Login => Scenario::Login,
            Self::Refresh => Scenario::Refresh,
            Self::SignUp => Scenario::SignUp,
            Self::Latency
            | Self::Growth
            | Self::Pages
            | Self::Contains
            | Self::Memory
            | Self::Start => {
                return None;
            }
        })
    }
}
