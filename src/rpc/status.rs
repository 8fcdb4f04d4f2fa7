//! Errors as clients get them: a status with `google.rpc` details (AIP-193).

use std::{borrow::Cow, cell::RefCell, collections::HashMap, error::Error as StdError, sync::Arc};

use http::{HeaderMap, Response};
use time::format_description::well_known::Rfc3339;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use super::{
    error::{Error, Spec, default_reason, reason_name},
    error_hint::hint,
    expired_cursor::MAX_CURSOR_AGE_DAYS,
    proto::error::v1::ErrorReason,
    validation::FieldViolations,
};
use crate::crypto::hashing::HashingError;

/// The domain of all reasons (`google.rpc.ErrorInfo`).
const DOMAIN: &str = "fastzero";

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
        Some(Error::ScopeMissing { required_scope }) => {
            let scope = required_scope.unwrap_or_default();
            metadata.insert("required_scope".to_owned(), scope.to_owned());
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
