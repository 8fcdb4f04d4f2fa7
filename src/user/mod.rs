//! Users, and the validation of usernames and email addresses.

use email_address::{EmailAddress, Options};
use time::OffsetDateTime;

use crate::{
    rpc::page_token::Cursor,
    types::{
        id::UserId,
        invalid::InvalidValue,
        text::{self, LineMode},
    },
};

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
    /// The email address, with its domain in lowercase.
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

/// The maximum length of an email address, in characters (RFC 5321, section 4.5.3.1.3,
/// without the angle brackets).
///
/// Test: `all_invalid_fields_of_a_sign_up_are_reported`.
pub const MAX_EMAIL_LENGTH: usize = 254;

/// A plain email address (RFC 5321, with the international characters of RFC 6531).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Parses an address. Trims it and converts its domain to lowercase.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        const ALLOWED: InvalidValue = InvalidValue::new(
            "must be a plain email address like name@domain.example of at most 254 characters",
        );

        let address = text::parse(raw, LineMode::Single, 1..=MAX_EMAIL_LENGTH)?;
        let (local, domain) = address.rsplit_once('@').ok_or(ALLOWED)?;
        let address = format!("{local}@{}", domain.to_lowercase());
        // The lowercase form may be longer, or not in NFC.
        let address = text::parse(&address, LineMode::Single, 1..=MAX_EMAIL_LENGTH)?;
        let options =
            Options::default().with_required_tld().without_domain_literal().without_display_text();
        let parsed = EmailAddress::parse_with_options(&address, options).map_err(|_| ALLOWED)?;
        // No top-level domain consists of digits only, so this is an IPv4 address.
        let tld = parsed.domain().rsplit('.').next().unwrap_or_default();
        let is_ip = tld.bytes().all(|byte| byte.is_ascii_digit());
        if parsed.local_part().starts_with('"') || is_ip {
            return Err(ALLOWED);
        }
        Ok(Self(address))
    }

    /// Returns the address as it is stored.
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

    #[test]
    fn email_addresses_are_validated() {
        for (raw, stored) in [
            ("ana@example.com", "ana@example.com"),
            (" Ana.Luz+todo@EXAMPLE.Com ", "Ana.Luz+todo@example.com"),
            ("josé@exämple.de", "josé@exämple.de"),
        ] {
            assert_eq!(Email::parse(raw), Ok(Email(stored.to_owned())));
        }
        for invalid in [
            "",
            "ana",
            "@example.com",
            "ana@",
            "ana@localhost",
            "ana@[127.0.0.1]",
            "ana@127.0.0.1",
            "ana@1.2.3.400",
            "Ana <ana@example.com>",
            "\"ana luz\"@example.com",
            "ana luz@example.com",
            "ana@exam ple.com",
            "ana@example..com",
            "ana@example.com\n",
            "ana\0@example.com",
            "a@b@example.com",
            &format!("ana@{}.com", "a.".repeat(130)),
            // The lowercase form has a combining dot, which no domain may contain.
            "ana@İ.com",
        ] {
            assert!(Email::parse(invalid).is_err(), "{invalid:?}");
        }
    }

    #[test]
    fn email_addresses_are_compared_case_insensitively() {
        let folded = |raw| Email::parse(raw).map(|email| email.folded());
        assert_eq!(folded("JOSÉ@example.com"), folded("josé@EXAMPLE.com"));
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

        #[test]
        fn a_parsed_address_parses_to_itself(
            raw in prop_oneof![
                any::<String>(),
                "[ ]?[a-zA-Z.+é\"]{1,8}@[a-zA-ZÉİΣß0-9.-]{1,12}\\.[a-zA-Z0-9İΣ]{1,4}[ ]?",
                "\\PC{1,10}@\\PC{1,10}\\.\\PC{1,5}",
            ]
        ) {
            if let Ok(email) = Email::parse(&raw) {
                prop_assert!(email.as_str().contains('@'));
                prop_assert!(email.as_str().chars().count() <= MAX_EMAIL_LENGTH);
                prop_assert_eq!(Email::parse(email.as_str()), Ok(email));
            }
        }
    }
}
