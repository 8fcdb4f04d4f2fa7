//! What PostgreSQL's errors (SQLSTATE, PostgreSQL's manual, appendix A) mean for a call.

use std::{borrow::Cow, error::Error as StdError};

use sqlx::postgres::PgDatabaseError;
use tokio_rustls::rustls::Error as TlsError;

use crate::rpc::error::Error;

pub(super) const INSUFFICIENT_PRIVILEGE: &str = "42501";
pub(super) const UNDEFINED_TABLE: &str = "42P01";
const FEATURE_NOT_SUPPORTED: &str = "0A000";
const PROTOCOL_VIOLATION: &str = "08P01";
const READ_ONLY_TRANSACTION: &str = "25006";
const UNIQUE_VIOLATION: &str = "23505";
const FOREIGN_KEY_VIOLATION: &str = "23503";

/// Classes of errors that a retry does not fix: invalid authorization (28) and an unknown
/// database (3D).
const PERMANENT_ERROR_CLASSES: [&str; 2] = ["28", "3D"];

/// Returns `true` if the statement violates this unique constraint.
#[must_use]
pub(crate) fn is_unique_violation(error: &sqlx::Error, constraint: &str) -> bool {
    violates(error, UNIQUE_VIOLATION, constraint)
}

/// Returns `true` if the statement violates this foreign key.
#[must_use]
pub(crate) fn is_foreign_key_violation(error: &sqlx::Error, constraint: &str) -> bool {
    violates(error, FOREIGN_KEY_VIOLATION, constraint)
}

/// A distributed PostgreSQL appends the number of a shard to the constraint's name, and may
/// give the name in the message only.
fn violates(error: &sqlx::Error, code: &str, constraint: &str) -> bool {
    let Some(database) = error.as_database_error() else {
        return false;
    };
    let is_named = match database.constraint() {
        Some(name) => name.starts_with(constraint),
        None => database.message().contains(&format!("\"{constraint}")),
    };
    database.code().as_deref() == Some(code) && is_named
}

/// Returns `true` if a retry of the connection cannot succeed.
pub(super) fn is_permanent(error: &sqlx::Error) -> bool {
    match sqlstate(error) {
        Some(code) => {
            PERMANENT_ERROR_CLASSES.iter().any(|class| code.starts_with(class))
                || is_refused_parameter(error)
        }
        None => matches!(error, sqlx::Error::Configuration(_)) || is_tls_error(error),
    }
}

/// Returns `true` if both sides do not agree on TLS, or one does not trust the other.
pub(super) fn is_tls_error(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Tls(_) => true,
        sqlx::Error::Io(error) => {
            error.get_ref().is_some_and(<dyn StdError + Send + Sync>::is::<TlsError>)
        }
        _ => false,
    }
}

/// Returns `true` if a pooler refused a startup parameter. PgBouncer has no code of its own for
/// that, and gives the one of a protocol violation for other errors, too.
pub(super) fn is_refused_parameter(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| {
        error.code().as_deref() == Some(PROTOCOL_VIOLATION)
            && error.message().contains("startup parameter")
    })
}

/// Returns `true` if a migration has changed the type of a column that a prepared statement of this
/// connection returns. The statement did not run. PostgreSQL has no code of its own for that.
fn is_stale_statement(error: &sqlx::Error) -> bool {
    let error = error.as_database_error().and_then(|it| it.try_downcast_ref::<PgDatabaseError>());
    error.is_some_and(|error| {
        error.code() == FEATURE_NOT_SUPPORTED && error.routine() == Some("RevalidateCachedQuery")
    })
}

/// Returns `true` if the connection cannot be used any more.
pub(super) fn is_connection_error(error: &(dyn StdError + 'static)) -> bool {
    let Some(error) = error.downcast_ref::<sqlx::Error>() else {
        return false;
    };
    match sqlstate(error) {
        None => true,
        // 08: connection exception. 57P: operator intervention, such as a shutdown. 25P03: idle
        // in transaction timeout. 25006: the primary has become a standby.
        Some(code) => {
            code.starts_with("08")
                || code.starts_with("57P")
                || ["25P03", READ_ONLY_TRANSACTION].contains(&&*code)
                // The other connections have prepared the same statement.
                || is_stale_statement(error)
        }
    }
}

/// Returns `true` if the connection works, but to a database that is read-only.
pub(super) fn is_read_only(error: &(dyn StdError + 'static)) -> bool {
    let error = error.downcast_ref::<sqlx::Error>();
    error.and_then(sqlstate).as_deref() == Some(READ_ONLY_TRANSACTION)
}

pub(super) fn sqlstate(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(sqlx::error::DatabaseError::code)
}

/// Separates an unavailable database from a bug.
impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let Some(code) = sqlstate(&error) else {
            return match error {
                sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => {
                    Self::DatabaseUnavailable(error.into())
                }
                other => Self::internal(other),
            };
        };
        match (&code[..2], &*code) {
            // Statement timeout, lock timeout, transaction timeout of the role.
            (_, "57014" | "55P03" | "25P04") => Self::DeadlineExceeded,
            // Connection exceptions; invalid authorization and unknown database, which an
            // operator may just be changing; insufficient resources; operator intervention;
            // system errors. 55000: a standby that is not ready. 25006: read-only. 25P03: idle
            // in transaction timeout. 40P01, 40001: deadlock, serialization failure.
            ("08" | "28" | "3D" | "53" | "57" | "58", _)
            | (_, "55000" | READ_ONLY_TRANSACTION | "25P03" | "40P01" | "40001") => {
                Self::DatabaseUnavailable(error.into())
            }
            _ if is_stale_statement(&error) => Self::DatabaseUnavailable(error.into()),
            _ => Self::internal(error),
        }
    }
}
