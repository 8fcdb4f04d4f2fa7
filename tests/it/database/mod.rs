//! The SQL statements that calls run: how many, in which batches, by which plans. And the counts of
//! an upgrade.

mod batching;
mod counts;
mod migrations;
mod plans;
mod slow_commits;
mod statements;
mod update_batches;
