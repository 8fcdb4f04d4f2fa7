//! Tests against the real server and a real PostgreSQL.

mod lifecycle;
mod statements;
mod support;
