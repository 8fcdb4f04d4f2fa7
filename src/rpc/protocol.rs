//! Errors of the gRPC protocol that the gRPC library leaves to the server, or that are made
//! before it.

use http::{HeaderMap, HeaderValue, StatusCode, header::ALLOW};
use tonic::{Code, Status, metadata::MetadataValue};

/// The prefix of a length-prefixed message (gRPC over HTTP/2): a compression flag and the length.
pub(crate) const MESSAGE_PREFIX_LEN: usize = 5;

/// The compressions of requests that the server accepts.
const ACCEPTED_ENCODINGS: &str = "gzip,identity";

/// What the client does not follow. The codes are those of gRPC (Status codes and their use in
/// gRPC), except for a message that is too large: there, the code is that of tonic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The request is no gRPC call.
    #[error("The HTTP method of a gRPC call is POST")]
    NotPost,
    /// The request is no gRPC call.
    #[error("The content type of a gRPC call is application/grpc")]
    ContentType,
    /// The server does not know the compression.
    #[error("The compression of the message is not supported. Use gzip or identity.")]
    UnsupportedEncoding,
    /// A cardinality violation: no message, or several.
    #[error("The method takes one message")]
    NotOneMessage,
    /// The message exceeds the limit, before or after decompression.
    #[error("The message is too large")]
    MessageTooLarge,
    /// The request ends within a message.
    #[error("The message is truncated")]
    Truncated,
    /// The message is not compressed as its metadata says.
    #[error("Cannot decompress the message")]
    InvalidCompression,
}

impl ProtocolError {
    /// Returns the status code.
    pub(super) fn code(self) -> Code {
        match self {
            Self::NotPost | Self::ContentType | Self::UnsupportedEncoding | Self::NotOneMessage => {
                Code::Unimplemented
            }
            Self::MessageTooLarge => Code::OutOfRange,
            Self::Truncated | Self::InvalidCompression => Code::Internal,
        }
    }

    /// Adds what the client needs to choose another compression.
    pub(super) fn add_metadata(self, status: &mut Status) {
        if self == Self::UnsupportedEncoding {
            let accepted = MetadataValue::from_static(ACCEPTED_ENCODINGS);
            status.metadata_mut().insert("grpc-accept-encoding", accepted);
        }
    }

    /// Returns the HTTP status, and adds its headers. A client of another protocol must not take
    /// the response for a success (gRPC over HTTP/2, Requests).
    pub(crate) fn http_status(self, headers: &mut HeaderMap) -> StatusCode {
        match self {
            Self::NotPost => {
                headers.insert(ALLOW, HeaderValue::from_static("POST"));
                StatusCode::METHOD_NOT_ALLOWED
            }
            Self::ContentType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            _ => StatusCode::OK,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::status::complete_error_details;

    /// gRPC over HTTP/2, Responses: `Percent-Encoded`.
    #[test]
    fn a_message_is_percent_encoded() {
        let response = Status::not_found("50% ü\n~").into_http::<()>();
        let (mut head, ()) = response.into_parts();
        complete_error_details(&mut head.headers, "a");
        assert_eq!(head.headers["grpc-message"], "50%25%20%C3%BC%0A~");
    }
}
