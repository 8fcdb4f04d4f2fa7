//! What refusals must look like.

use std::collections::BTreeSet;

use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

/// The call is refused with this code and reason, and with all details that every error
/// has. Gives the status for further looks.
#[track_caller]
pub fn assert_refused<T>(result: Result<Response<T>, Status>, code: Code, reason: &str) -> Status {
    let Err(status) = result else {
        panic!("the call was answered, but {code:?} {reason} was expected");
    };
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!((status.code(), &*info.reason), (code, reason), "{status:?}");
    assert_eq!(info.domain, "fastzero");
    let request = details.request_info().unwrap_or_else(|| panic!("no RequestInfo in {status:?}"));
    let returned = status.metadata().get("x-request-id").and_then(|id| id.to_str().ok());
    assert_eq!(Some(&*request.request_id), returned, "{status:?}");
    status
}

/// The call is refused with INVALID_ARGUMENT for exactly these fields, in any order.
#[track_caller]
pub fn assert_invalid<T>(result: Result<Response<T>, Status>, fields: &[&str]) -> Status {
    let status = assert_refused(result, Code::InvalidArgument, "INVALID_REQUEST");
    let details = status.get_error_details();
    let violations = details.bad_request().map(|request| &*request.field_violations);
    let violations = violations.unwrap_or_default();
    let named: BTreeSet<_> = violations.iter().map(|violation| &*violation.field).collect();
    assert_eq!(named, fields.iter().copied().collect(), "{violations:?}");
    for violation in violations {
        assert!(!violation.description.is_empty(), "{violation:?}");
    }
    status
}

/// The call is refused because nobody is logged in.
#[track_caller]
pub fn assert_unauthenticated<T>(result: Result<Response<T>, Status>, reason: &str) -> Status {
    assert_refused(result, Code::Unauthenticated, reason)
}
