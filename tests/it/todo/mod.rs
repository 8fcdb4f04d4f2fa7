//! Todos.

mod changes;
mod clocks;
mod creation;
mod deletion;
mod filters;
mod lookup;
mod order;
mod pages;
mod sweep;
mod updates;
