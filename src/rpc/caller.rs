//! The caller of a method, and the client that the call comes from, as extensions of the
//! request. A method of the API that is not public has a caller.

use std::net::IpAddr;

use time::OffsetDateTime;
use tonic::Request;

use super::error::Error;
use crate::types::{
    id::{SessionId, UserId},
    invalid::InvalidValue,
};

/// The authenticated user of a call, and the session of the access token. Only the
/// authentication layer adds it to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Caller {
    /// The user.
    pub user_id: UserId,
    /// The session.
    pub session_id: SessionId,
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

    /// Parses a user id from a request, where `me` means the caller.
    pub fn resolve_user_id(&self, id: &str) -> Result<UserId, InvalidValue> {
        if id == "me" { Ok(self.user_id) } else { UserId::parse(id) }
    }
}

/// An access token that is valid, with its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifiedToken {
    /// The caller that the token names.
    pub caller: Caller,
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
        let ip = request.extensions().get::<Self>().copied();
        ip.ok_or_else(|| Error::internal("the request has no client address"))
    }
}
