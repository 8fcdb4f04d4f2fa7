//! What all tests share: a real PostgreSQL, a real server on a database of the test's
//! own, and callers.

pub mod app;
pub mod assert;
pub mod client;
pub mod health;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod statements;

pub use app::App;
pub use client::{Client, PASSWORD};
