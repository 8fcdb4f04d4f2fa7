//! The error type of this program.

use std::error::Error;

/// Any error. Every error ends the run, so only its text matters.
pub type BoxError = Box<dyn Error + Send + Sync>;

pub type Result<T, E = BoxError> = std::result::Result<T, E>;
