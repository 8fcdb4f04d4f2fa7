//! fast-zero: users, authentication and todos over gRPC, on PostgreSQL.
//!
//! # Layout
//!
//! ```text
//! main ─ cli ─ server ─ config
//!                │
//!         middleware, transport        the way of a call: middleware/mod.rs has the picture
//!                │
//!         user, auth, todo             a feature each: mod.rs, service.rs, store
//!                │
//!            database ─ rpc ─ crypto ─ limits ─ telemetry ─ types
//! ```
//!
//! Imports run down only, and a test holds that. A feature is a directory: `mod.rs` says what the
//! things are, `service.rs` turns messages into calls and back, `store` holds the SQL. `user`
//! and `todo` do not know `auth`: they get a `Caller`.
//!
//! # Invariants
//!
//! - Each method declares who may call it in `proto/`; the build fails without it.
//! - The owner's ID is in every statement on what a user owns, so that another user's rows are
//!   not found.
//! - A password exists as a type that can be hashed but not stored, or as one that can be
//!   compared only.
//! - Text from a request reaches a statement only through a type that has parsed it.
//! - A write is one statement, or a transaction that no dropped call can cut in two.
//! - Protobuf messages stop at `service.rs`, SQL at `store`, statuses at `rpc::error`.
//! - The source of an error goes to the log, never to the client; a secret goes to neither.
//! - Every limit is a named constant or a setting, and its documentation names the test that
//!   fails without it.

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
