//! What the services share: the generated API, access rules, errors, validation, field masks,
//! etags, page tokens, and the caller of a method.

pub(crate) mod caller;
pub(crate) mod error;
mod error_hint;
pub(crate) mod etag;
pub(crate) mod expired_cursor;
pub(crate) mod open_stream;
pub(crate) mod page_token;
pub(crate) mod policy;
pub mod proto;
pub(crate) mod protocol;
pub(crate) mod reflection;
pub(crate) mod status;
pub(crate) mod update_mask;
pub(crate) mod validation;

#[cfg(feature = "test-service")]
pub(crate) mod test_service;
