//! Why a call fails, by meaning.

use std::time::Duration;

use time::OffsetDateTime;
use tonic::Code;

use super::{
    expired_cursor::ExpiredCursor, proto::error::v1::ErrorReason, protocol::ProtocolError,
    validation::FieldViolations,
};
use crate::{
    crypto::hashing::HashingError,
    limits::admission::Overloaded,
    types::{
        error_chain::{BoxError, ErrorChain},
        jitter::random_fraction,
    },
};

/// The delay after which a client may repeat a call that was shed: about the time in which a
/// full password hashing queue empties.
const OVERLOADED_RETRY_DELAY: Duration = Duration::from_millis(500);

/// The delay after which a client may repeat a call that found no database: about the interval
/// of the health check.
const DATABASE_RETRY_DELAY: Duration = Duration::from_secs(1);

/// The longest delay after which a client whose connection closes may reconnect.
///
/// Test: `a_shutdown_ends_watches_with_a_last_cursor`.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// Why a call fails. The text is the message that the client gets; each variant is documented
/// with its namesake in `fastzero.error.v1.ErrorReason`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Not authenticated")]
    NotAuthenticated,
    #[error("Could not validate credentials")]
    TokenInvalid,
    #[error("Could not validate credentials")]
    TokenExpired {
        /// The time by which the token was verified.
        server_time: OffsetDateTime,
    },
    #[error("Could not validate credentials")]
    SessionRevoked,
    #[error("Incorrect email or password")]
    IncorrectCredentials,
    #[error("Could not validate refresh token")]
    RefreshTokenInvalid,
    #[error("Could not validate refresh token")]
    RefreshTokenExpired,
    #[error("Could not validate refresh token")]
    RefreshTokenReused,
    #[error("Invalid request{0}")]
    InvalidRequest(FieldViolations),
    #[error("Not enough permissions")]
    NotEnoughPermissions,
    #[error("The token may not call this method")]
    ScopeMissing {
        /// The scope of the method; `None` if the method requires a session.
        required_scope: Option<&'static str>,
    },
    #[error("The user is disabled")]
    UserDisabled,
    #[error("Could not validate reset code")]
    ResetCodeInvalid,
    #[error("Personal access token not found")]
    PersonalAccessTokenNotFound,
    #[error("Too many personal access tokens")]
    PersonalAccessTokenLimitReached,
    #[error("User not found")]
    UserNotFound,
    #[error("Session not found")]
    SessionNotFound,
    #[error("Task not found.")]
    TodoNotFound,
    #[error("Task is not deleted.")]
    TodoNotDeleted,
    #[error("The cursor has expired. Sync again without a cursor.")]
    CursorExpired(ExpiredCursor),
    #[error("Username already exists")]
    UsernameExists,
    #[error("Email already exists")]
    EmailExists,
    #[error("The etag does not match the current version. Get the resource and retry.")]
    EtagMismatch {
        /// What has the etag, as callers call it: `todo`.
        resource: &'static str,
        /// The etag of the current version.
        current_etag: String,
    },
    #[error("The server is overloaded. Retry later.")]
    Overloaded,
    #[error("Too many attempts")]
    TooManyAttempts {
        /// The time until the next attempt is admitted.
        retry_after: Duration,
    },
    #[error("Deadline exceeded")]
    DeadlineExceeded,
    /// The source goes to the log only.
    #[error("The database is unavailable. Retry later.")]
    DatabaseUnavailable(BoxError),
    /// The source goes to the log only.
    #[error("Internal error")]
    Internal(BoxError),
    #[error("Method not found")]
    Unimplemented,
    /// The client does not follow the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    #[error("The connection is closing. Reconnect and retry.")]
    Stopping,
}

/// The source of an error that another call logs.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct DuplicateSource(String);

/// The status of a variant.
pub(super) struct Spec {
    pub(super) code: Code,
    pub(super) reason: ErrorReason,
    pub(super) retry_after: Option<Duration>,
}

impl Error {
    /// Creates the error of a bug, or of anything else that is no client's fault.
    pub fn internal(source: impl Into<BoxError>) -> Self {
        Self::Internal(source.into())
    }

    /// Returns the error for an operator, where there is no client.
    #[must_use]
    pub fn into_source(self) -> BoxError {
        match self {
            Self::Internal(source) | Self::DatabaseUnavailable(source) => source,
            other => other.into(),
        }
    }

    /// Returns the same error for another call that shared the failed work. Only the call with
    /// the original logs the source.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        let duplicate = |source: &BoxError| DuplicateSource(ErrorChain(&**source).to_string());
        match self {
            Self::DatabaseUnavailable(source) => {
                Self::DatabaseUnavailable(duplicate(source).into())
            }
            Self::DeadlineExceeded => Self::DeadlineExceeded,
            Self::UserNotFound => Self::UserNotFound,
            Self::Internal(source) => Self::internal(duplicate(source)),
            other => Self::internal(other.to_string()),
        }
    }

    /// Returns `true` if another call logs the source.
    pub(crate) fn is_duplicate(&self) -> bool {
        match self {
            Self::DatabaseUnavailable(source) | Self::Internal(source) => {
                source.is::<DuplicateSource>()
            }
            _ => false,
        }
    }

    /// Returns code, reason and retry delay: the one place that knows them.
    pub(super) fn spec(&self) -> Spec {
        let (code, reason) = match self {
            Self::NotAuthenticated => (Code::Unauthenticated, ErrorReason::NotAuthenticated),
            Self::TokenInvalid => (Code::Unauthenticated, ErrorReason::TokenInvalid),
            Self::TokenExpired { .. } => (Code::Unauthenticated, ErrorReason::TokenExpired),
            Self::SessionRevoked => (Code::Unauthenticated, ErrorReason::SessionRevoked),
            Self::IncorrectCredentials => {
                (Code::Unauthenticated, ErrorReason::IncorrectCredentials)
            }
            Self::RefreshTokenInvalid => (Code::Unauthenticated, ErrorReason::RefreshTokenInvalid),
            Self::RefreshTokenExpired => (Code::Unauthenticated, ErrorReason::RefreshTokenExpired),
            Self::RefreshTokenReused => (Code::Unauthenticated, ErrorReason::RefreshTokenReused),
            Self::InvalidRequest(_) => (Code::InvalidArgument, ErrorReason::InvalidRequest),
            Self::NotEnoughPermissions => {
                (Code::PermissionDenied, ErrorReason::NotEnoughPermissions)
            }
            Self::ScopeMissing { .. } => (Code::PermissionDenied, ErrorReason::ScopeMissing),
            Self::UserDisabled => (Code::PermissionDenied, ErrorReason::UserDisabled),
            Self::ResetCodeInvalid => (Code::Unauthenticated, ErrorReason::ResetCodeInvalid),
            Self::PersonalAccessTokenNotFound => {
                (Code::NotFound, ErrorReason::PersonalAccessTokenNotFound)
            }
            Self::PersonalAccessTokenLimitReached => {
                (Code::FailedPrecondition, ErrorReason::PersonalAccessTokenLimitReached)
            }
            Self::UserNotFound => (Code::NotFound, ErrorReason::UserNotFound),
            Self::SessionNotFound => (Code::NotFound, ErrorReason::SessionNotFound),
            Self::TodoNotFound => (Code::NotFound, ErrorReason::TodoNotFound),
            Self::TodoNotDeleted => (Code::AlreadyExists, ErrorReason::TodoNotDeleted),
            Self::CursorExpired(_) => (Code::OutOfRange, ErrorReason::CursorExpired),
            Self::UsernameExists => (Code::AlreadyExists, ErrorReason::UsernameExists),
            Self::EmailExists => (Code::AlreadyExists, ErrorReason::EmailExists),
            Self::EtagMismatch { .. } => (Code::Aborted, ErrorReason::EtagMismatch),
            Self::Overloaded => (Code::ResourceExhausted, ErrorReason::Overloaded),
            Self::TooManyAttempts { .. } => (Code::ResourceExhausted, ErrorReason::TooManyAttempts),
            Self::DeadlineExceeded => (Code::DeadlineExceeded, ErrorReason::DeadlineExceeded),
            Self::DatabaseUnavailable(_) => (Code::Unavailable, ErrorReason::DatabaseUnavailable),
            Self::Internal(_) => (Code::Internal, ErrorReason::Internal),
            Self::Unimplemented => (Code::Unimplemented, ErrorReason::Unimplemented),
            Self::Protocol(error) => (error.code(), default_reason(error.code())),
            Self::Stopping => (Code::Unavailable, ErrorReason::Stopping),
        };
        let retry_after = match self {
            Self::Overloaded => Some(OVERLOADED_RETRY_DELAY),
            Self::TooManyAttempts { retry_after } => Some(*retry_after),
            Self::DatabaseUnavailable(_) => Some(DATABASE_RETRY_DELAY),
            // Spread, because all clients of the replica reconnect.
            Self::Stopping => Some(MAX_RECONNECT_DELAY.mul_f64(random_fraction())),
            _ => None,
        };
        Spec { code, reason, retry_after }
    }

    /// Returns the name of the reason.
    pub(crate) fn reason(&self) -> &'static str {
        reason_name(self.spec().reason)
    }

    /// Returns the error of a conditional write that changed nothing: the version that the
    /// etag names is not the `current_etag`, or the resource does not exist.
    pub(crate) fn precondition(
        resource: &'static str,
        current_etag: Option<String>,
        not_found: Self,
    ) -> Self {
        match current_etag {
            Some(current_etag) => Self::EtagMismatch { resource, current_etag },
            None => not_found,
        }
    }
}

impl From<HashingError> for Error {
    fn from(error: HashingError) -> Self {
        match error {
            HashingError::QueueFull => Self::Overloaded,
            failed => Self::internal(failed),
        }
    }
}

impl From<Overloaded> for Error {
    fn from(Overloaded: Overloaded) -> Self {
        Self::Overloaded
    }
}

/// Without a violation, the parser has a bug.
impl From<FieldViolations> for Error {
    fn from(violations: FieldViolations) -> Self {
        if violations.is_empty() {
            return Self::internal("a parser rejected a request without a violation");
        }
        Self::InvalidRequest(violations)
    }
}

/// Returns the name of a reason as clients get it.
pub(super) fn reason_name(reason: ErrorReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix("ERROR_REASON_").unwrap_or(name)
}

/// Returns the reason of an error that this crate did not make.
pub(super) fn default_reason(code: Code) -> ErrorReason {
    match code {
        Code::Unimplemented => ErrorReason::Unimplemented,
        Code::OutOfRange => ErrorReason::MessageTooLarge,
        Code::NotFound => ErrorReason::ServiceUnknown,
        Code::InvalidArgument => ErrorReason::InvalidRequest,
        Code::DeadlineExceeded => ErrorReason::DeadlineExceeded,
        Code::ResourceExhausted => ErrorReason::Overloaded,
        _ => ErrorReason::Internal,
    }
}
