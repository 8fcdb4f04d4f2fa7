//! Authentication: sessions, their tokens, passwords, and brute-force protection.
//!
//! A login opens a session. Its access token (a JWT) authenticates calls for minutes; its
//! refresh token gets the next pair, once. [`sessions`] owns the sessions, in the database and in
//! the cache. [`personal_access_tokens`] are for services and scripts, and need no login.

mod access_token;
pub(crate) mod authenticator;
mod credential_cache;
pub(crate) mod disabled_users;
mod failed_lookups;
mod failures;
pub(crate) mod login_throttle;
pub(crate) mod password_reset;
mod personal_access_tokens;
mod refresh_token;
mod requests;
pub(crate) mod service;
pub(crate) mod sessions;
mod signing_keys;
mod store;
mod verified_tokens;
pub(crate) mod watches;

use time::OffsetDateTime;

use crate::types::id::SessionId;

pub(crate) use self::{
    access_token::{AccessTokens, TokenSettings},
    refresh_token::RefreshTokens,
    signing_keys::Algorithm,
    store::find_user_id,
};

/// The maximum number of active sessions of a user. A login beyond ends the oldest.
///
/// Test: `a_login_beyond_a_hundred_active_sessions_revokes_the_oldest`.
pub(crate) const MAX_SESSIONS: i64 = 100;

/// How long an access token is accepted after it has expired: the maximum difference between the
/// clocks of replicas, which all follow the clock of the database.
///
/// Test: `an_access_token_is_valid_until_it_expires`.
pub(crate) const TOKEN_LEEWAY: time::Duration = time::Duration::seconds(5);

/// How long the direct predecessor of a refresh token gets the same successor again, instead of
/// being treated as stolen.
///
/// Test: `reuse_of_the_previous_refresh_token_after_ten_seconds_revokes_the_session`.
pub(crate) const REFRESH_GRACE_PERIOD: time::Duration = time::Duration::seconds(10);

/// The longest stored `user-agent`, in characters.
///
/// Test: `a_session_records_the_client_of_its_login`.
const MAX_USER_AGENT_LEN: usize = 256;

/// A session of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Session {
    /// The ID of the session.
    pub(crate) id: SessionId,
    /// The time of the login or the last rotation of the refresh token.
    pub(crate) rotated_at: OffsetDateTime,
    /// The time when the session ends unless its refresh token is rotated.
    pub(crate) expires_at: OffsetDateTime,
    /// The `user-agent` of the login.
    pub(crate) user_agent: String,
    /// The IP address of the login's client.
    pub(crate) peer: String,
}
