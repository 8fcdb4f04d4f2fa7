//! Why a `.env` file cannot be used.

use std::{fmt, io};

/// Why a `.env` file cannot be used. The message never contains a line of the file, which may
/// hold a secret.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DotenvError {
    /// The line of a variable that this program reads is invalid.
    #[error(".env, line {line}: {name} {problem}")]
    Line { line: usize, name: String, problem: Problem },
    /// The file begins with the byte order mark of UTF-16, as PowerShell writes it.
    #[error(".env must be UTF-8 text, not UTF-16: write it again with another encoding")]
    Utf16,
    /// The file cannot be read.
    #[error("cannot read .env")]
    Io(#[source] io::Error),
}

/// What is wrong with a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// The name is not followed by an assignment.
    Assignment,
    /// The value is not UTF-8, or contains a NUL character.
    Text,
    /// A quote is not closed, or text follows a quoted value of several lines.
    Quote,
    /// A `${` is not closed, or encloses no name and no known operator.
    Substitution,
    /// A variable that the value requires, `${NAME:?}`, is not set.
    Required,
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Assignment => "must be followed by = and its value",
            Self::Text => "must be UTF-8 text",
            Self::Quote => "must end with the quote that it starts with",
            Self::Substitution => {
                "must have variables like ${NAME} or ${NAME:-default}: write $$ for a dollar sign, \
                 or put the value into single quotes"
            }
            Self::Required => "must have a value for each variable that it requires with ${NAME:?}",
        })
    }
}
