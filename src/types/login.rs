//! Logins: the texts by which people name an account.

use std::hash::{Hash, Hasher};

use super::{
    email::EmailKey,
    text::{LineMode, fold_case, parse},
};

/// The longest login, in characters: that of an email address.
///
/// Test: `a_login_is_a_username_or_an_email_in_any_case`.
const MAX_LOGIN_LEN: usize = 254;

/// What identifies an account.
#[derive(Clone, Debug)]
pub enum LoginIdentifier {
    /// A username, folded.
    Username(String),
    /// An email address.
    Email(EmailKey),
    /// A text that no user can have as a username or an email.
    Invalid,
}

impl LoginIdentifier {
    /// Parses a login: an email address has an `@`, a username has none.
    #[must_use]
    pub fn parse(raw: &str) -> Self {
        match parse(raw, LineMode::Single, 1..=MAX_LOGIN_LEN) {
            Ok(login) if login.contains('@') => Self::Email(EmailKey::new(&login)),
            Ok(login) => Self::Username(fold_case(&login)),
            Err(_) => Self::Invalid,
        }
    }

    /// Returns a text that all spellings of the login have in common. No username has an `@`,
    /// and none is empty.
    #[must_use]
    pub fn as_key(&self) -> &str {
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
