//! fast-zero: users, authentication and to-dos over gRPC, on PostgreSQL.
//!
//! # Layout
//!
//! `main` reads the settings and runs a subcommand; [`server`] wires everything. A call
//! comes in over a [`connection`], which may speak [`tls`], and through [`call`], which
//! gives it an id and a deadline, has [`admission`] let it in (within what [`peers`] may have)
//! and [`auth::guard`] find out who calls, and passes it to a service:
//!
//! ```text
//! main ── server ── call ── auth::guard
//!                    │
//!                    ├── user::service ── user::store ─┐
//!                    ├── auth::service ── auth::store ─┼── database ── PostgreSQL
//!                    └── todo::service ── todo::store ─┘
//! ```
//!
//! A feature is a folder: [`user`], [`auth`], [`mod@todo`]. In it, `mod.rs` says what the
//! things are and what they may look like, `service.rs` turns messages of the contract
//! into those and back, `store.rs` holds the SQL. What features share lies beside them:
//! [`text`], [`id`], [`etag`], [`mask`], [`pagination`], [`invalid`], [`validation`], [`error`] and
//! [`password`]. Of `auth`, the other features know only [`caller`]. How often somebody may
//! guess or ask is counted in memory: passwords in [`auth::attempts`], names in
//! [`user::sign_ups`].
//!
//! Look-ups and additions that come at the same time share a statement ([`coalesce`]).
//!
//! Around them: [`config`], [`keys`] and [`telemetry`] at the start, [`audit`], [`health`],
//! [`metrics`] with their own port ([`metrics_server`]), [`traces`] and [`shutdown`] while it
//! runs, [`probe`] from outside, and `embedded`, the private PostgreSQL of development.
//!
//! # What always holds
//!
//! - A method needs an access token unless [`auth::guard`] lists it as public.
//! - The owner's id is part of every statement on what somebody owns, so that what is
//!   another's cannot be found.
//! - A password exists only as [`password::NewPassword`], which can be hashed but not
//!   stored, or as [`password::Attempt`], which can only be compared.
//! - Text from outside reaches a statement only through a type that has parsed it.
//! - What is changed is changed by one statement, or by a transaction that no dropped
//!   call can cut in two ([`database::complete`]).
//! - Messages of the contract end in `service.rs`, SQL in `store.rs`, statuses in
//!   [`error`].
//! - An error's cause goes to the log, never to the caller; a secret goes to neither.

pub mod admission;
pub mod audit;
pub mod auth;
pub mod call;
pub mod caller;
pub mod coalesce;
pub mod config;
pub mod connection;
pub mod database;
#[cfg(feature = "embedded")]
pub mod embedded;
pub mod error;
pub mod etag;
pub mod health;
pub mod keys;
pub mod mask;
pub mod metrics;
pub mod metrics_server;
pub mod pagination;
pub mod password;
pub mod peers;
pub mod probe;
pub mod proto;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod todo;
pub mod traces;
pub mod types;
pub mod user;
pub mod validation;
