//! What all tests share: a real PostgreSQL, a real server on a database of the test's
//! own, and callers.

pub mod app;
pub mod assert;
pub mod auth;
pub mod balancer;
pub mod certificates;
pub mod client;
pub mod collector;
pub mod compose;
pub mod container;
#[cfg(feature = "embedded")]
pub mod embedded;
pub mod health;
pub mod http2;
pub mod lag;
pub mod lock;
pub mod messages;
pub mod metrics;
pub mod parallel;
pub mod postgres;
pub mod priority;
pub mod process;
pub mod proxy;
pub mod random;
pub mod sql;
pub mod statements;
pub mod text;
pub mod time;
pub mod todos;
pub mod tokens;
pub mod users;
pub mod wait;
pub mod wire;

pub use app::App;
pub use client::{Client, PASSWORD};
