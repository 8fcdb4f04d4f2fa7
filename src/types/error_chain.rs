//! Errors as values without a type, and their texts with all sources.

use std::{error::Error, fmt};

/// A boxed error of any type.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Displays an error with all its sources on one line, separated by colons.
#[derive(Debug)]
pub struct ErrorChain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(formatter, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
