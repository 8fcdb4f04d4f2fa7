//! The image, the stacks that compose starts, and the PostgreSQL container of the tests.

mod compose;
mod postgres;
mod release;
