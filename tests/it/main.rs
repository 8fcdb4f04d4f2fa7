//! Tests against the real server and a real PostgreSQL.

mod architecture;
mod auth;
mod containers;
mod contract;
mod database;
mod examples;
mod faults;
mod glossary;
mod limits;
mod process;
mod readme;
mod support;
mod telemetry;
mod todo;
mod user;
