//! The SQL statements that calls run: how many, in which batches, by which plans.

mod batching;
mod migrations;
mod plans;
mod statements;
