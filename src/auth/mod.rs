//! Authentication: sessions, their tokens, passwords, and brute-force protection.
//!
//! A login opens a session. Its access token (a JWT) authenticates calls for minutes; its
//! refresh token gets the next pair, once. [`sessions`] owns the sessions, in the database and in
//! the cache.

pub(crate) mod authenticator;
pub(crate) mod login_throttle;
pub(crate) mod service;
mod session_cache;
pub(crate) mod sessions;
mod store;
mod token;

use std::hash::{Hash, Hasher};

use time::OffsetDateTime;

use crate::types::{
    email::EmailKey,
    id::SessionId,
    text::{LineMode, fold_case, parse},
};

use self::token::TOKEN_LEEWAY;
pub(crate) use self::token::{AccessTokens, RefreshTokens};

/// The maximum number of active sessions of a user. A login beyond ends the oldest.
///
/// Test: `a_login_beyond_a_hundred_active_sessions_revokes_the_oldest`.
pub(crate) const MAX_SESSIONS: i64 = 100;

/// How long the direct predecessor of a refresh token gets the same successor again, instead of
/// being treated as stolen.
///
/// Test: `reuse_of_the_previous_refresh_token_after_ten_seconds_revokes_the_session`.
pub(crate) const REFRESH_GRACE_PERIOD: time::Duration = time::Duration::seconds(10);

/// The longest stored `user-agent`, in characters.
///
/// Test: `a_session_records_the_client_of_its_login`.
const MAX_USER_AGENT_LEN: usize = 256;

/// The longest login, in characters: that of an email address.
///
/// Test: `a_login_is_a_username_or_an_email_in_any_case`.
const MAX_LOGIN_LEN: usize = 254;

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

/// The login of a request: what identifies the account.
#[derive(Clone, Debug)]
enum LoginIdentifier {
    /// A username, folded.
    Username(String),
    Email(EmailKey),
    /// A text that no user can have as a username or an email.
    Invalid,
}

impl LoginIdentifier {
    /// Parses a login: an email address has an `@`, a username has none.
    fn parse(raw: &str) -> Self {
        match parse(raw, LineMode::Single, 1..=MAX_LOGIN_LEN) {
            Ok(login) if login.contains('@') => Self::Email(EmailKey::new(&login)),
            Ok(login) => Self::Username(fold_case(&login)),
            Err(_) => Self::Invalid,
        }
    }

    /// Returns a text that all spellings of the login have in common. No username has an `@`,
    /// and none is empty.
    fn as_key(&self) -> &str {
        match self {
            Self::Username(folded) => folded,
            Self::Email(key) => key.folded(),
            Self::Invalid => "",
        }
    }
}

/// Guesses count for an account, whichever spelling they use.
impl Hash for LoginIdentifier {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_key().hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_a_username_or_an_email_in_any_case() {
        for username in [" ANA ", "ana"] {
            let login = LoginIdentifier::parse(username);
            assert!(matches!(&login, LoginIdentifier::Username(folded) if folded == "ana"));
            assert_eq!(login.as_key(), "ana");
        }
        for (email, key) in [
            ("Ana@EXAMPLE.com", "ana@example.com"),
            ("Jo@münchen.de", "jo@münchen.de"),
            ("jo@XN--MNCHEN-3YA.de", "jo@münchen.de"),
        ] {
            let login = LoginIdentifier::parse(email);
            assert!(matches!(login, LoginIdentifier::Email(_)), "{login:?}");
            assert_eq!(login.as_key(), key);
        }
        for invalid in ["a\0na", &"a".repeat(255)] {
            assert!(matches!(LoginIdentifier::parse(invalid), LoginIdentifier::Invalid));
        }
    }
}
