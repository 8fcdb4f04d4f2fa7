//! The caller of a method, and the client that the call comes from, as extensions of the
//! request. A method of the API that is not public has a caller.

use std::net::IpAddr;

use http::Extensions;
use time::OffsetDateTime;
use tonic::Request;

use super::error::Error;
use crate::types::{
    id::{PersonalAccessTokenId, SessionId, UserId},
    invalid::InvalidValue,
};

/// The authenticated user of a call, and the credential. Only the authentication layer adds it
/// to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Caller {
    /// The user.
    pub user_id: UserId,
    /// The credential that the call came with.
    pub credential: Credential,
}

/// What authenticates a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Credential {
    /// An access token of this session.
    Session(SessionId),
    /// This personal access token.
    PersonalAccessToken(PersonalAccessTokenId),
}

impl Credential {
    /// Returns the error of a call whose credential does not exist any more.
    #[must_use]
    pub fn revoked_error(self) -> Error {
        match self {
            Self::Session(_) => Error::SessionRevoked,
            Self::PersonalAccessToken(_) => Error::TokenInvalid,
        }
    }
}

/// A session and its user: the caller of a method with the access level `SESSION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionCaller {
    /// The user.
    pub user_id: UserId,
    /// The session.
    pub session_id: SessionId,
}

impl SessionCaller {
    /// Returns the caller of a request.
    ///
    /// # Errors
    /// [`Error::Internal`] if the access level of the method is not `SESSION`.
    pub fn from_request<T>(request: &Request<T>) -> Result<Self, Error> {
        let Caller { user_id, credential } = Caller::from_request(request)?;
        match credential {
            Credential::Session(session_id) => Ok(Self { user_id, session_id }),
            Credential::PersonalAccessToken(_) => {
                Err(Error::internal("the method requires a session and has another access level"))
            }
        }
    }
}

impl From<SessionCaller> for Caller {
    fn from(SessionCaller { user_id, session_id }: SessionCaller) -> Self {
        Self { user_id, credential: Credential::Session(session_id) }
    }
}

impl Caller {
    /// Returns the caller of a request.
    ///
    /// # Errors
    /// [`Error::Internal`] if the method is public.
    pub fn from_request<T>(request: &Request<T>) -> Result<Self, Error> {
        let caller = request.extensions().get::<Self>().copied();
        caller.ok_or_else(|| Error::internal("a method that is public has no caller"))
    }

    /// Returns the error of a call that found no row of its own user: the user was deleted, and the
    /// credential with it. Other errors stay as they are.
    #[must_use]
    pub fn own_user_error(&self, error: Error) -> Error {
        match error {
            Error::UserNotFound => self.credential.revoked_error(),
            other => other,
        }
    }

    /// Parses a user id from a request, where `me` means the caller.
    pub fn resolve_user_id(&self, id: &str) -> Result<UserId, InvalidValue> {
        if id == "me" { Ok(self.user_id) } else { UserId::parse(id) }
    }
}

/// An access token that is valid, with its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifiedToken {
    /// The caller that the token names.
    pub caller: SessionCaller,
    /// The time when the token expires.
    pub expires_at: OffsetDateTime,
}

/// The IP address of the client, after `x-forwarded-for`. An IPv4-mapped IPv6 address is
/// canonicalized to IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientIp {
    /// The address.
    pub ip: IpAddr,
    /// Whether the peer is a trusted proxy, whether it reported another address or not.
    pub via_trusted_proxy: bool,
}

impl ClientIp {
    /// Returns the client's address of a request.
    ///
    /// # Errors
    /// [`Error::Internal`] if the request did not pass the layers.
    pub fn from_request<T>(request: &Request<T>) -> Result<Self, Error> {
        Self::from_extensions(request.extensions())
    }

    /// Returns the client's address from the extensions of a request.
    ///
    /// # Errors
    /// [`Error::Internal`] if the request did not pass the layers.
    pub fn from_extensions(extensions: &Extensions) -> Result<Self, Error> {
        let ip = extensions.get::<Self>().copied();
        ip.ok_or_else(|| Error::internal("the request has no client address"))
    }
}
