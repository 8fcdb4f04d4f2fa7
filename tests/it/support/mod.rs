//! The parts that tests use: a real PostgreSQL, a real server on a database of the test's
//! own, and clients.

pub mod app;
pub mod assert;
pub mod auth;
pub mod certificates;
pub mod changes;
pub mod checksummed_text;
pub mod client;
pub mod collector;
pub mod compose;
pub mod compression;
pub mod container;
pub mod database;
pub mod database_clock;
#[cfg(feature = "embedded")]
pub mod embedded;
pub mod follower;
pub mod health;
pub mod http2;
pub mod load_balancer;
pub mod messages;
pub mod metrics;
pub mod operator;
pub mod parallel;
pub mod personal_access_tokens;
pub mod pooler;
pub mod postgres;
pub mod priority;
pub mod process;
pub mod proxy;
pub mod random;
pub mod raw_client;
pub mod readme;
pub mod row_lock;
pub mod scheduling_delay;
pub mod sources;
pub mod statement_proxy;
pub mod statements;
#[cfg(target_os = "linux")]
pub mod system_clock;
pub mod text;
pub mod time;
pub mod tls_database;
pub mod todos;
pub mod tokens;
pub mod users;
pub mod wait;

pub use app::App;
pub use client::{Client, PASSWORD, RpcResult};

/// Every path of a mask that names the read-only fields of a user or a todo.
pub const READ_ONLY_PATHS: [&str; 8] = [
    "id",
    "create_time",
    "create_time.seconds",
    "create_time.nanos",
    "update_time",
    "update_time.seconds",
    "update_time.nanos",
    "etag",
];
