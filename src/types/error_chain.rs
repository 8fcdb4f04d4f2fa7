//! Errors as values without a type, and their texts with all sources.

use std::{error::Error, fmt};

/// A boxed error of any type.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Displays an error with all its sources on one line, separated by colons. A source
/// whose text an error repeats is shown once.
#[derive(Debug)]
pub struct ErrorChain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for ErrorChain<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = self.0.to_string();
        formatter.write_str(&last)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            let text = error.to_string();
            // Some errors end with the text of their source.
            if !last.ends_with(&text) {
                write!(formatter, ": {text}")?;
                last = text;
            }
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("connecting failed")]
    struct Outer(#[source] sqlx::Error);

    #[test]
    fn each_source_is_shown_once() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let error = Outer(refused.into());
        assert_eq!(
            ErrorChain(&error).to_string(),
            "connecting failed: error communicating with database: connection refused"
        );
    }
}
