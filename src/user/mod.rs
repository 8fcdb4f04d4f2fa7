//! Users, and the validation of usernames.

use time::OffsetDateTime;

use crate::{
    rpc::page_token::Cursor,
    types::{email::Email, id::UserId, invalid::InvalidValue, text},
};

pub(crate) mod operator;
pub(crate) mod service;
pub(crate) mod sign_up_limit;
pub(crate) mod store;

/// An account, without its password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The ID of the user, which never changes.
    pub id: UserId,
    /// The username, in the user's spelling.
    pub username: String,
    /// The email address, with its domain in the Unicode form.
    pub email: String,
    /// The time when the username or the email address was last updated.
    pub updated_at: OffsetDateTime,
    /// The number of the current version, which increases with each of these updates.
    pub version: i64,
}

impl User {
    /// Removes the email address, which other users must not see.
    #[must_use]
    pub fn redact_email(self) -> Self {
        Self { email: String::new(), ..self }
    }
}

/// A username: 3 to 32 characters of `A-Z a-z 0-9 . _ -`, starting with a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Username(String);

impl Username {
    /// Parses a username and preserves its spelling.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        let allowed = |char: char| char.is_ascii_alphanumeric() || ".-_".contains(char);
        let valid = (3..=32).contains(&raw.len())
            && raw.starts_with(|char: char| char.is_ascii_alphanumeric())
            && raw.chars().all(allowed);
        valid.then(|| Self(raw.to_owned())).ok_or(InvalidValue::new(
            "must have 3 to 32 characters of A-Z a-z 0-9 . _ - and begin with a letter or digit",
        ))
    }

    /// Returns the username in the user's spelling.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the case-folded form, for case-insensitive comparison.
    #[must_use]
    pub fn folded(&self) -> String {
        text::fold_case(&self.0)
    }
}

/// A user to be created, without the password.
#[derive(Debug)]
pub struct NewUser {
    /// The new user's id.
    pub id: UserId,
    /// The username, which may already exist.
    pub username: Username,
    /// The email address, which may already exist.
    pub email: Email,
}

/// The fields that an update changes.
#[derive(Debug)]
pub struct UserPatch {
    /// The new username, or `None` if it does not change.
    pub username: Option<Username>,
    /// The new email address, or `None` if it does not change.
    pub email: Option<Email>,
}

/// Lists of users are ordered by ID.
impl Cursor for UserId {
    fn to_bytes(&self) -> Vec<u8> {
        self.as_uuid().as_bytes().to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        uuid::Uuid::from_slice(bytes).ok().map(Self::from_uuid)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn usernames_are_validated() {
        for valid in ["abc", "Ana.Luz_99-x", "0day", &"a".repeat(32)] {
            assert!(Username::parse(valid).is_ok(), "{valid}");
        }
        for invalid in
            ["", "ab", &"a".repeat(33), ".abc", "-abc", "_abc", "a b", "aé3", " abc", "a@b"]
        {
            assert!(Username::parse(invalid).is_err(), "{invalid}");
        }
    }

    proptest! {
        #[test]
        fn a_username_is_unchanged_or_rejected(
            raw in prop_oneof![any::<String>(), "[A-Za-z0-9._-]{0,40}", "[ -~é]{2,5}"]
        ) {
            if let Ok(username) = Username::parse(&raw) {
                prop_assert_eq!(username.as_str(), &raw);
                prop_assert!((3..=32).contains(&raw.len()) && raw.is_ascii());
                // A login with the username is never mistaken for one with an email address.
                prop_assert!(!raw.contains('@'));
            }
        }
    }
}
