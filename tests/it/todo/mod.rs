//! Todos.

mod creation;
mod filters;
mod lookup;
mod order;
mod pages;
mod updates;
