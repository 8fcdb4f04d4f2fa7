//! fast-zero: users, authentication and todos over gRPC, on PostgreSQL.
//!
//! # Layout
//!
//! ```text
//! cli                 the command line
//! server              the composition root
//! config              the settings
//! middleware          the lifecycle of a request: mod.rs has the diagram
//! transport           connections: TLS, HTTP/2
//! user, todo, auth    a feature each: mod.rs, service.rs, store
//! database            the pool, batching, migrations
//! rpc                 errors and their statuses, method table, page tokens
//! crypto              keys, password hashing
//! limits              admission control, quotas
//! telemetry           log, metrics, traces, health
//! types               ids, texts, the clock
//! ```
//!
//! A module imports only modules below it, and a test enforces that. A feature is a directory:
//! `mod.rs` says what the things are, `service.rs` turns messages into calls and back (in `auth`
//! with `requests.rs`), `store` holds the SQL (of todos also `list`, `list_batch` and `row`).
//! `user` and `todo` do not know `auth`: they get a `Caller`.
//!
//! # Invariants
//!
//! - Each method declares in `proto/` who may call it, and with which scope; the build fails
//!   without it.
//! - The owner's ID is in every statement on what a user owns, so that another user's rows are
//!   not found.
//! - A `NewPassword` can only be hashed, and a `CandidatePassword` can only be compared.
//! - Text from a request reaches a statement only through a type that has parsed it.
//! - A write is one statement, or a transaction that no dropped call can cut in two.
//! - A write to todos takes the clock of the owner first, and moves it on, in the same statement.
//! - Protobuf messages stop at `service.rs`, and in `auth` also at `requests.rs`. SQL stops at
//!   `store`. Only `rpc::status` turns an error of the API into a status.
//! - The source of an error goes to the log, never to the client; a secret goes to neither.
//! - Every limit is a setting or a named constant. A constant names the test that fails
//!   without it.

mod auth;
mod cli;
mod config;
mod crypto;
mod database;
mod limits;
mod middleware;
mod rpc;
mod server;
mod telemetry;
mod todo;
mod transport;
mod types;
mod user;

pub use self::{cli::run, config::Config, rpc::proto, server::Server};

/// The statements on todos, for the tests of their plans and the benchmark.
#[doc(hidden)]
pub use self::todo::statements as todo_statements;
