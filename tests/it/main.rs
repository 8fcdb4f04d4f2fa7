//! Tests against the real server and a real PostgreSQL.

mod architecture;
mod attacks;
mod attempts;
mod cancellation;
mod coalescing;
mod compose;
mod container;
mod contract;
#[cfg(feature = "embedded")]
mod durability;
#[cfg(feature = "embedded")]
mod embedded;
mod flood;
mod fuzz;
mod health;
mod lifecycle;
mod limits;
mod login;
mod metrics;
mod outages;
mod pages;
mod passwords;
mod plans;
mod races;
mod readme;
mod refresh;
mod replicas;
mod sessions;
mod settings;
mod statements;
mod support;
mod timing;
mod tls;
mod todos;
mod tokens;
mod traces;
mod updates;
mod users;
