//! Users: who may sign up, and under which names.

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
    /// Names the user for ever.
    pub id: UserId,
    /// As written by the user.
    pub username: String,
    /// With its domain in lower case.
    pub email: String,
    /// When username or e-mail were last changed.
    pub updated_at: OffsetDateTime,
    /// Counts those changes.
    pub version: i64,
}

impl User {
    /// The account as another user sees it.
    #[must_use]
    pub fn redact_email(self) -> Self {
        Self { email: String::new(), ..self }
    }
}

/// 3 to 32 of `A-Z a-z 0-9 . _ -`, the first a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Username(String);

impl Username {
    /// Reads a username; it is kept as written.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        let allowed = |char: char| char.is_ascii_alphanumeric() || ".-_".contains(char);
        let good = (3..=32).contains(&raw.len())
            && raw.starts_with(|char: char| char.is_ascii_alphanumeric())
            && raw.chars().all(allowed);
        good.then(|| Self(raw.to_owned())).ok_or(InvalidValue::new(
            "must have 3 to 32 characters of A-Z a-z 0-9 . _ - and begin with a letter or digit",
        ))
    }

    /// As written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// For comparing.
    #[must_use]
    pub fn folded(&self) -> String {
        text::fold_case(&self.0)
    }
}

/// What a mail server takes as an address, in characters (RFC 5321, section 4.5.3.1.3,
/// less the angle brackets).
pub const MAX_EMAIL_LENGTH: usize = 254;

/// A plain e-mail address (RFC 5321, with the letters of RFC 6531).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Reads an address: trimmed, its domain in lower case.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        const ALLOWED: InvalidValue = InvalidValue::new(
            "must be a plain e-mail address like name@domain.example of at most 254 characters",
        );

        let address = text::parse(raw, LineMode::Single, 1..=MAX_EMAIL_LENGTH)?;
        let (local, domain) = address.rsplit_once('@').ok_or(ALLOWED)?;
        let address = format!("{local}@{}", domain.to_lowercase());
        // Lower case may be longer, or no longer in the normalisation form.
        let address = text::parse(&address, LineMode::Single, 1..=MAX_EMAIL_LENGTH)?;
        let options =
            Options::default().with_required_tld().without_domain_literal().without_display_text();
        let parsed = EmailAddress::parse_with_options(&address, options).map_err(|_| ALLOWED)?;
        // No top-level domain consists of digits: this is an IPv4 address.
        let last = parsed.domain().rsplit('.').next().unwrap_or_default();
        let is_ip = last.bytes().all(|byte| byte.is_ascii_digit());
        if parsed.local_part().starts_with('"') || is_ip {
            return Err(ALLOWED);
        }
        Ok(Self(address))
    }

    /// As kept.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// For comparing.
    #[must_use]
    pub fn folded(&self) -> String {
        text::fold_case(&self.0)
    }
}

/// The names of a user-to-be.
#[derive(Debug)]
pub struct NewUser {
    /// The new user's id.
    pub id: UserId,
    /// Not yet known to be free.
    pub username: Username,
    /// Not yet known to be free.
    pub email: Email,
}

/// What an update changes.
#[derive(Debug)]
pub struct UserPatch {
    /// The new username, if it changes.
    pub username: Option<Username>,
    /// The new address, if it changes.
    pub email: Option<Email>,
}

/// Users are listed by id.
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
    fn usernames_are_plain() {
        for good in ["abc", "Ana.Luz_99-x", "0day", &"a".repeat(32)] {
            assert!(Username::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "ab", &"a".repeat(33), ".abc", "-abc", "_abc", "a b", "aé3", " abc", "a@b"]
        {
            assert!(Username::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_plain() {
        for (raw, kept) in [
            ("ana@example.com", "ana@example.com"),
            (" Ana.Luz+todo@EXAMPLE.Com ", "Ana.Luz+todo@example.com"),
            ("josé@exämple.de", "josé@exämple.de"),
        ] {
            assert_eq!(Email::parse(raw), Ok(Email(kept.to_owned())));
        }
        for bad in [
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
            // Its lower case has a combining dot, which no domain has.
            "ana@İ.com",
        ] {
            assert!(Email::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_are_compared_without_case() {
        let folded = |raw| Email::parse(raw).map(|email| email.folded());
        assert_eq!(folded("JOSÉ@example.com"), folded("josé@EXAMPLE.com"));
    }

    proptest! {
        #[test]
        fn a_username_is_taken_as_it_is_or_refused(
            raw in prop_oneof![any::<String>(), "[A-Za-z0-9._-]{0,40}", "[ -~é]{2,5}"]
        ) {
            if let Ok(username) = Username::parse(&raw) {
                prop_assert_eq!(username.as_str(), &raw);
                prop_assert!((3..=32).contains(&raw.len()) && raw.is_ascii());
                // No login with it is taken for an address.
                prop_assert!(!raw.contains('@'));
            }
        }

        #[test]
        fn an_address_that_is_kept_is_taken_again(
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
