//! Why a call fails, by meaning, and how the error goes to the client (AIP-193).

use std::{
    borrow::Cow, cell::RefCell, collections::HashMap, error::Error as StdError, sync::Arc,
    time::Duration,
};

use http::{HeaderMap, Response};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::{
    error_hint::hint,
    expired_cursor::{ExpiredCursor, MAX_CURSOR_AGE_DAYS},
    proto::error::v1::ErrorReason,
    protocol::ProtocolError,
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

/// The domain of all reasons (`google.rpc.ErrorInfo`).
const DOMAIN: &str = "fastzero";

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
struct Spec {
    code: Code,
    reason: ErrorReason,
    retry_after: Option<Duration>,
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
            Self::SessionRevoked => Self::SessionRevoked,
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
    fn spec(&self) -> Spec {
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

tokio::task_local! {
    /// The error of the last status that was made, while a stream is polled.
    static CONVERTED: RefCell<Option<Arc<Error>>>;
}

/// Polls a stream, and records the last error of which it made a status. The encoder of a stream
/// drops the source of a status.
pub(crate) fn record_converted<T>(error: &mut Option<Arc<Error>>, poll: impl FnOnce() -> T) -> T {
    CONVERTED.sync_scope(RefCell::new(error.take()), || {
        let polled = poll();
        *error = CONVERTED.with(RefCell::take);
        polled
    })
}

/// Keeps the error as the source of the status, where [`error_of`] finds it for the layer that
/// logs and counts. The client gets code, message and details.
impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let Spec { code, reason, retry_after } = error.spec();
        let mut details = ErrorDetails::new();
        set_error_info(&mut details, reason, Some(&error));
        if let Some(delay) = retry_after {
            details.set_retry_info(Some(delay));
        }
        if let Error::InvalidRequest(violations) = &error {
            let violation = |(field, allowed)| FieldViolation::new(field, allowed);
            details.set_bad_request(violations.iter().map(violation).collect::<Vec<_>>());
        }
        let mut status = Self::with_error_details(code, error.to_string(), details);
        if let Error::Protocol(error) = &error {
            error.add_metadata(&mut status);
        }
        let error = Arc::new(error);
        let _ = CONVERTED.try_with(|converted| converted.replace(Some(error.clone())));
        status.set_source(error);
        status
    }
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

/// Returns the error that a response was made of, if it was one of this crate.
pub(crate) fn error_of<B>(response: &Response<B>) -> Option<&Error> {
    let status = response.extensions().get::<Status>()?;
    status.source()?.downcast_ref()
}

/// Returns the status code in headers or trailers.
pub(crate) fn status_code(headers: &HeaderMap) -> Option<Code> {
    headers.get(Status::GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()))
}

/// Completes the details of an error, if the headers or trailers carry one: adds the request
/// id, and the reason where the gRPC library or the health service made the error. Returns the
/// status code.
pub(crate) fn complete_error_details(headers: &mut HeaderMap, request_id: &str) -> Code {
    // Most calls end with OK, and need no status with a message and details.
    let is_error = status_code(headers).is_some_and(|code| code != Code::Ok);
    let Some(status) = is_error.then(|| Status::from_header_map(headers)).flatten() else {
        return Code::Ok;
    };
    let mut details = status.get_error_details();
    if details.error_info().is_none() {
        set_error_info(&mut details, default_reason(status.code()), None);
    }
    details.set_request_info(request_id, "");
    let complete = Status::with_error_details(status.code(), status.message(), details);
    // Fails only for a message that is no header value, and this one was a header.
    let _ = complete.add_header(headers);
    complete.code()
}

fn set_error_info(details: &mut ErrorDetails, reason: ErrorReason, error: Option<&Error>) {
    let mut hint = Cow::Borrowed(hint(reason));
    let mut metadata = HashMap::new();
    match error {
        Some(Error::TokenExpired { server_time }) => {
            if let Ok(server_time) = server_time.format(&Rfc3339) {
                metadata.insert("server_time".to_owned(), server_time);
            }
        }
        Some(Error::EtagMismatch { resource, current_etag }) => {
            hint = format!("read the {resource} again and retry with its etag").into();
            metadata.insert("current_etag".to_owned(), current_etag.clone());
        }
        Some(Error::CursorExpired(expired)) => {
            metadata.insert("retention_days".to_owned(), MAX_CURSOR_AGE_DAYS.to_string());
            let cause = expired.cause().map(|cause| ("cause".to_owned(), cause.to_owned()));
            metadata.extend(cause);
        }
        _ => {}
    }
    metadata.insert("hint".to_owned(), hint.into_owned());
    details.set_error_info(reason_name(reason), DOMAIN, metadata);
}

/// Returns the name of a reason as clients get it.
fn reason_name(reason: ErrorReason) -> &'static str {
    let name = reason.as_str_name();
    name.strip_prefix("ERROR_REASON_").unwrap_or(name)
}

/// Returns the reason of an error that this crate did not make.
fn default_reason(code: Code) -> ErrorReason {
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
