//! Assertions about failed calls.

use std::collections::BTreeSet;

use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::RpcResult;

/// The documentation of the API.
pub const API_DOC: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/api.md"));

/// Asserts that the call fails with this code and reason, with the details that every error
/// has, and with a hint that `docs/api.md` lists for the reason. Returns the status for further
/// assertions.
#[track_caller]
pub fn assert_status<T>(result: RpcResult<T>, code: Code, reason: &str) -> Status {
    let Err(status) = result else {
        panic!("the call succeeded, but {code:?} {reason} was expected");
    };
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!((status.code(), &*info.reason), (code, reason), "{status:?}");
    assert_eq!(info.domain, "fastzero");
    let hint = info.metadata.get("hint").unwrap_or_else(|| panic!("no hint in {status:?}"));
    let row = |line: &str| line.contains(&format!("`{reason}`")) && line.contains(&**hint);
    assert!(API_DOC.lines().any(row), "docs/api.md has no row with {reason} and: {hint}");
    let request = details.request_info().unwrap_or_else(|| panic!("no RequestInfo in {status:?}"));
    let returned = status.metadata().get("x-request-id").and_then(|id| id.to_str().ok());
    assert_eq!(Some(&*request.request_id), returned, "{status:?}");
    status
}

/// Asserts that the call fails with INVALID_ARGUMENT for exactly these fields, in any order.
#[track_caller]
pub fn assert_invalid<T>(result: RpcResult<T>, fields: &[&str]) -> Status {
    let status = assert_status(result, Code::InvalidArgument, "INVALID_REQUEST");
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

/// Asserts that the call fails with UNAUTHENTICATED and this reason.
#[track_caller]
pub fn assert_unauthenticated<T>(result: RpcResult<T>, reason: &str) -> Status {
    assert_status(result, Code::Unauthenticated, reason)
}

/// Asserts that the error of a stream has the details of every error. Its request ID came
/// back in the metadata of the response.
#[track_caller]
pub fn assert_has_error_details(status: &Status) {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!((info.reason.is_empty(), &*info.domain), (false, "fastzero"), "{status:?}");
    let request = details.request_info().unwrap_or_else(|| panic!("no RequestInfo in {status:?}"));
    assert!(!request.request_id.is_empty());
}

/// Asserts that the status contains nothing of the error that the database returned.
#[track_caller]
pub fn assert_hides_cause(status: &Status) {
    let debug = format!("{status:?}").to_lowercase();
    for cause in ["todos_", "relation", "column", "exist", "sql", "postgres", "42p01", "src/"] {
        assert!(!debug.contains(cause), "{cause}: {debug}");
    }
}
