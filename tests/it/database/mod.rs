//! The SQL statements that calls run: how many, in which batches, by which plans.

mod batching;
mod counts;
mod plans;
mod statements;
