//! What a client should do after an error.

use super::proto::error::v1::ErrorReason;

/// Returns what a client should do next, the same for every error with the reason.
pub(super) fn hint(reason: ErrorReason) -> &'static str {
    match reason {
        ErrorReason::Unspecified | ErrorReason::Internal => {
            "report the request ID to the operator of the service"
        }
        ErrorReason::NotAuthenticated => "send authorization: Bearer <token>",
        ErrorReason::SessionRevoked
        | ErrorReason::RefreshTokenInvalid
        | ErrorReason::RefreshTokenExpired
        | ErrorReason::RefreshTokenReused => "call Login",
        ErrorReason::TokenInvalid | ErrorReason::TokenExpired => {
            "call RefreshToken, or use another personal access token"
        }
        ErrorReason::IncorrectCredentials => "correct the login or the password",
        ErrorReason::InvalidRequest => "correct the fields that BadRequest names",
        ErrorReason::NotEnoughPermissions => "use your own user ID, or me",
        ErrorReason::ScopeMissing => "use a token with required_scope, or the token of a session",
        ErrorReason::UserDisabled => "ask the operator of the service to enable the user",
        ErrorReason::ResetCodeInvalid => "ask the operator of the service for a new code",
        ErrorReason::PersonalAccessTokenNotFound => "find the ID with ListPersonalAccessTokens",
        ErrorReason::PersonalAccessTokenLimitReached => "revoke a personal access token",
        ErrorReason::UserNotFound => "find the ID with ListUsers",
        ErrorReason::SessionNotFound => "find the ID with ListSessions",
        ErrorReason::TodoNotFound => "find the ID with ListTodos",
        ErrorReason::TodoNotDeleted => "read the todo with GetTodo",
        ErrorReason::CursorExpired => "sync again with an empty cursor",
        ErrorReason::UsernameExists => "choose another username",
        ErrorReason::EmailExists => "use another email, or call Login",
        ErrorReason::EtagMismatch => "read the resource again and retry with its etag",
        ErrorReason::Overloaded
        | ErrorReason::TooManyAttempts
        | ErrorReason::DatabaseUnavailable => "retry after the delay in RetryInfo",
        ErrorReason::DeadlineExceeded => "read what a write would change before you retry it",
        ErrorReason::Unimplemented => {
            "check the name of the method, and compress messages with gzip only"
        }
        ErrorReason::MessageTooLarge => "send a smaller message",
        ErrorReason::ServiceUnknown => "list the services with server reflection",
        ErrorReason::Stopping => "reconnect and retry",
    }
}
