//! The `.env` file in the working directory.

use std::io;

/// Why a `.env` file cannot be used. The message never contains a line of the file, which may
/// hold a secret.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DotenvError {
    /// A line is no assignment.
    #[error(".env must consist of NAME=value lines: see column {0} of the invalid one")]
    Line(usize),
    /// The file cannot be read.
    #[error("cannot read .env")]
    Io(#[source] io::Error),
    /// Anything else.
    #[error("cannot use .env")]
    Other,
}

/// Sets the variables of `.env` that are not set yet, if there is such a file.
pub(crate) fn load() -> Result<(), DotenvError> {
    match dotenvy::from_path(".env") {
        Ok(()) => Ok(()),
        Err(error) if error.not_found() => Ok(()),
        Err(dotenvy::Error::LineParse(_, column)) => Err(DotenvError::Line(column)),
        Err(dotenvy::Error::Io(error)) => Err(DotenvError::Io(error)),
        Err(_) => Err(DotenvError::Other),
    }
}
