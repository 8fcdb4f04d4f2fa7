//! Tests against the real server and a real PostgreSQL.

mod statements;
mod support;
