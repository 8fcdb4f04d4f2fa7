//! Authentication: sessions, the tokens that belong to them, and who may call what.

use time::OffsetDateTime;

use crate::types::id::{SessionId, UserId};

pub mod attempts;
pub mod guard;
pub mod service;
mod store;
mod token;

pub use token::{AccessTokens, RefreshTokens};

/// Live sessions of a user at the most. When another is opened, the oldest ends.
pub const MAX_SESSIONS: i64 = 100;

/// For how long the direct predecessor of a refresh token gets the same successor
/// again, instead of being taken for stolen.
pub const REFRESH_GRACE: time::Duration = time::Duration::seconds(10);

/// The longest `user-agent` that is kept, in characters.
const MAX_USER_AGENT_LENGTH: usize = 256;

/// A session of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Names the session for ever.
    pub id: SessionId,
    /// When the login or the last rotation of the refresh token was.
    pub rotated_at: OffsetDateTime,
    /// When it ends if it is not used until then.
    pub expires_at: OffsetDateTime,
    /// What logged in.
    pub user_agent: String,
    /// Where from: an IP address.
    pub peer: String,
}

/// A session that is opened by a login.
#[derive(Debug)]
struct NewSession {
    id: SessionId,
    user_id: UserId,
    now: OffsetDateTime,
    expires_at: OffsetDateTime,
    user_agent: String,
    peer: String,
}

/// The name by which somebody logs in.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum LoginName {
    Username(String),
    Email(String),
    /// No user can have it.
    Nobody,
}

/// The most characters that a login can have: those of an e-mail address.
const MAX_LOGIN_LENGTH: usize = 254;

impl LoginName {
    /// Usernames have no `@`, e-mail addresses always do.
    fn parse(raw: &str) -> Self {
        use crate::types::text::{LineMode, fold_case, parse};
        match parse(raw, LineMode::Single, 1..=MAX_LOGIN_LENGTH) {
            Ok(name) if name.contains('@') => Self::Email(fold_case(&name)),
            Ok(name) => Self::Username(fold_case(&name)),
            Err(_) => Self::Nobody,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_a_username_or_an_address_in_any_case() {
        assert_eq!(LoginName::parse(" ANA "), LoginName::Username("ana".into()));
        assert_eq!(LoginName::parse("Ana@EXAMPLE.com"), LoginName::Email("ana@example.com".into()));
        for nobody in ["a\0na", &"a".repeat(255)] {
            assert_eq!(LoginName::parse(nobody), LoginName::Nobody);
        }
    }
}
