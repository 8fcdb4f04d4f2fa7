//! The SQL statements that calls run: how many, in which batches, by which plans. The schema, its
//! migrations, and the counts of an upgrade.

mod batching;
mod counts;
mod migrations;
mod plans;
mod schema;
mod slow_commits;
mod statements;
mod update_batches;
