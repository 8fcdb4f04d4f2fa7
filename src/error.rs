//! What can go wrong with a call, by meaning, and how it is told to the caller.

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use http::{HeaderMap, Response};
use time::format_description::well_known::Rfc3339;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::{
    password::HashingError,
    proto::error::v1::ErrorReason,
    types::{
        clock,
        error_chain::{BoxError, ErrorChain},
    },
    validation::FieldViolations,
};

/// The domain of all reasons (`google.rpc.ErrorInfo`).
const DOMAIN: &str = "fastzero";

/// When a call that found the service overloaded may come again: about the time in
/// which a full hashing queue empties.
const RETRY_OVERLOADED_AFTER: Duration = Duration::from_millis(500);

/// When a call that found no database may come again: the health service looks for
/// it about as often.
const RETRY_DATABASE_AFTER: Duration = Duration::from_secs(1);

/// Why a call fails. What a value tells the caller stands with its namesake in
/// `fastzero.error.v1.ErrorReason`.
#[derive(Debug)]
#[expect(missing_docs, reason = "the contract's ErrorReason documents each")]
pub enum Error {
    NotAuthenticated,
    TokenInvalid,
    TokenExpired,
    SessionRevoked,
    IncorrectCredentials,
    RefreshTokenInvalid,
    RefreshTokenExpired,
    RefreshTokenReused,
    InvalidRequest(FieldViolations),
    NotEnoughPermissions,
    UserNotFound,
    SessionNotFound,
    TodoNotFound,
    UsernameExists,
    EmailExists,
    EtagMismatch,
    Overloaded,
    /// With the time after which the next one is taken.
    TooManyAttempts {
        retry_after: Duration,
    },
    DeadlineExceeded,
    /// With what the log is to say; it goes no further.
    DatabaseUnavailable(BoxError),
    /// With what the log is to say; it goes no further.
    Internal(BoxError),
    Unimplemented,
    Stopping,
}

impl Error {
    /// A fault of this service.
    pub fn internal(cause: impl Into<BoxError>) -> Self {
        Self::Internal(cause.into())
    }

    /// What to tell an operator, where there is no caller.
    #[must_use]
    pub fn into_cause(self) -> BoxError {
        match self {
            Self::Internal(cause) | Self::DatabaseUnavailable(cause) => cause,
            other => other.into(),
        }
    }

    /// The same, for another call that it befell.
    #[must_use]
    pub fn again(&self) -> Self {
        match self {
            Self::DatabaseUnavailable(cause) => {
                Self::DatabaseUnavailable(ErrorChain(&**cause).to_string().into())
            }
            Self::DeadlineExceeded => Self::DeadlineExceeded,
            Self::Internal(cause) => Self::internal(ErrorChain(&**cause).to_string()),
            other => Self::internal(other.to_string()),
        }
    }

    fn reason(&self) -> ErrorReason {
        match self {
            Self::NotAuthenticated => ErrorReason::NotAuthenticated,
            Self::TokenInvalid => ErrorReason::TokenInvalid,
            Self::TokenExpired => ErrorReason::TokenExpired,
            Self::SessionRevoked => ErrorReason::SessionRevoked,
            Self::IncorrectCredentials => ErrorReason::IncorrectCredentials,
            Self::RefreshTokenInvalid => ErrorReason::RefreshTokenInvalid,
            Self::RefreshTokenExpired => ErrorReason::RefreshTokenExpired,
            Self::RefreshTokenReused => ErrorReason::RefreshTokenReused,
            Self::InvalidRequest(_) => ErrorReason::InvalidRequest,
            Self::NotEnoughPermissions => ErrorReason::NotEnoughPermissions,
            Self::UserNotFound => ErrorReason::UserNotFound,
            Self::SessionNotFound => ErrorReason::SessionNotFound,
            Self::TodoNotFound => ErrorReason::TodoNotFound,
            Self::UsernameExists => ErrorReason::UsernameExists,
            Self::EmailExists => ErrorReason::EmailExists,
            Self::EtagMismatch => ErrorReason::EtagMismatch,
            Self::Overloaded => ErrorReason::Overloaded,
            Self::TooManyAttempts { .. } => ErrorReason::TooManyAttempts,
            Self::DeadlineExceeded => ErrorReason::DeadlineExceeded,
            Self::DatabaseUnavailable(_) => ErrorReason::DatabaseUnavailable,
            Self::Internal(_) => ErrorReason::Internal,
            Self::Unimplemented => ErrorReason::Unimplemented,
            Self::Stopping => ErrorReason::Stopping,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotAuthenticated
            | Self::TokenInvalid
            | Self::TokenExpired
            | Self::SessionRevoked
            | Self::IncorrectCredentials
            | Self::RefreshTokenInvalid
            | Self::RefreshTokenExpired
            | Self::RefreshTokenReused => Code::Unauthenticated,
            Self::InvalidRequest(_) => Code::InvalidArgument,
            Self::NotEnoughPermissions => Code::PermissionDenied,
            Self::UserNotFound | Self::SessionNotFound | Self::TodoNotFound => Code::NotFound,
            Self::UsernameExists | Self::EmailExists => Code::AlreadyExists,
            Self::EtagMismatch => Code::Aborted,
            Self::Overloaded | Self::TooManyAttempts { .. } => Code::ResourceExhausted,
            Self::DeadlineExceeded => Code::DeadlineExceeded,
            Self::DatabaseUnavailable(_) | Self::Stopping => Code::Unavailable,
            Self::Internal(_) => Code::Internal,
            Self::Unimplemented => Code::Unimplemented,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded => Some(RETRY_OVERLOADED_AFTER),
            Self::TooManyAttempts { retry_after } => Some(*retry_after),
            Self::DatabaseUnavailable(_) => Some(RETRY_DATABASE_AFTER),
            // Another replica, or the next one here, may answer at once.
            Self::Stopping => Some(Duration::ZERO),
            _ => None,
        }
    }
}

/// What the caller reads.
impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAuthenticated => formatter.write_str("Not authenticated"),
            Self::TokenInvalid | Self::TokenExpired | Self::SessionRevoked => {
                formatter.write_str("Could not validate credentials")
            }
            Self::IncorrectCredentials => formatter.write_str("Incorrect email or password"),
            Self::RefreshTokenInvalid | Self::RefreshTokenExpired | Self::RefreshTokenReused => {
                formatter.write_str("Could not validate refresh token")
            }
            Self::InvalidRequest(violations) => {
                formatter.write_str("InvalidValue request")?;
                violations.iter().enumerate().try_for_each(|(index, (field, allowed))| {
                    let separator = if index == 0 { ": " } else { "; " };
                    write!(formatter, "{separator}{field} {allowed}")
                })
            }
            Self::NotEnoughPermissions => formatter.write_str("Not enough permissions"),
            Self::UserNotFound => formatter.write_str("User not found"),
            Self::SessionNotFound => formatter.write_str("Session not found"),
            Self::TodoNotFound => formatter.write_str("Task not found."),
            Self::UsernameExists => formatter.write_str("Username already exists"),
            Self::EmailExists => formatter.write_str("Email already exists"),
            Self::EtagMismatch => {
                formatter.write_str("The resource has changed: its etag is another one")
            }
            Self::Overloaded => formatter.write_str("Too much to do at the moment"),
            Self::TooManyAttempts { .. } => formatter.write_str("Too many attempts"),
            Self::DeadlineExceeded => formatter.write_str("The deadline has passed"),
            Self::DatabaseUnavailable(_) => {
                formatter.write_str("The database is not available at the moment")
            }
            Self::Internal(_) => formatter.write_str("Internal error"),
            Self::Unimplemented => formatter.write_str("The service has no such method"),
            Self::Stopping => formatter.write_str("The service is stopping"),
        }
    }
}

impl StdError for Error {}

impl From<HashingError> for Error {
    fn from(error: HashingError) -> Self {
        match error {
            HashingError::QueueFull => Self::Overloaded,
            failed => Self::internal(failed),
        }
    }
}

/// An empty list is a bug of the parser.
impl From<FieldViolations> for Error {
    fn from(violations: FieldViolations) -> Self {
        if violations.is_empty() {
            return Self::internal("a parser rejected a request without a violation");
        }
        Self::InvalidRequest(violations)
    }
}

/// Keeps the error as the source of the status, for the layer that logs and counts errors:
/// [`error_of`] finds it there. The client gets the code, the message and the details.
impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut details = ErrorDetails::new();
        set_reason(&mut details, error.reason());
        if let Some(delay) = error.retry_after() {
            details.set_retry_info(Some(delay));
        }
        let (code, message) = (error.code(), error.to_string());
        if let Error::InvalidRequest(violations) = &error {
            let violation = |(field, allowed)| FieldViolation::new(field, allowed);
            details.set_bad_request(violations.iter().map(violation).collect::<Vec<_>>());
        }
        let mut status = Self::with_error_details(code, message, details);
        status.set_source(Arc::new(error));
        status
    }
}

/// Returns the error that a response was made of, if a service of this crate made it.
pub(crate) fn error_of<B>(response: &Response<B>) -> Option<&Error> {
    let status = response.extensions().get::<Status>()?;
    status.source()?.downcast_ref()
}

impl From<HashingError> for Status {
    fn from(error: HashingError) -> Self {
        Error::from(error).into()
    }
}

impl From<FieldViolations> for Status {
    fn from(violations: FieldViolations) -> Self {
        Error::from(violations).into()
    }
}

/// Completes the details of an error, if these headers or trailers tell of one: the
/// request's id, and the reason where the gRPC library or the health service made the
/// error. Gives the call's code.
pub(crate) fn complete_details(headers: &mut HeaderMap, request_id: &str) -> Code {
    let Some(status) = Status::from_header_map(headers) else {
        return Code::Ok;
    };
    if status.code() == Code::Ok {
        return Code::Ok;
    }
    let mut details = status.get_error_details();
    if details.error_info().is_none() {
        set_reason(&mut details, library_reason(status.code()));
    }
    details.set_request_info(request_id, "");
    let complete = Status::with_error_details(status.code(), status.message(), details);
    // Fails only for a message that is no header value, and this one was a header.
    let _ = complete.add_header(headers);
    complete.code()
}

fn set_reason(details: &mut ErrorDetails, reason: ErrorReason) {
    let name = reason.as_str_name();
    let name = name.strip_prefix("ERROR_REASON_").unwrap_or(name);
    let mut metadata = std::collections::HashMap::new();
    if reason == ErrorReason::TokenExpired
        && let Ok(server_time) = clock::now().format(&Rfc3339)
    {
        metadata.insert("server_time".to_owned(), server_time);
    }
    details.set_error_info(name, DOMAIN, metadata);
}

/// The reasons of the errors that are not made here.
fn library_reason(code: Code) -> ErrorReason {
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
