//! Password rules.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};

use crate::types::{
    invalid::InvalidValue,
    text::{self, LineMode},
};

/// The length of a password, in characters.
///
/// Test: `all_invalid_fields_of_a_password_change_are_reported_and_nothing_changes`.
const PASSWORD_LEN: std::ops::RangeInclusive<usize> = 8..=128;

/// A valid new password. It can only be hashed, not stored.
#[derive(Clone, Debug)]
pub struct NewPassword(pub(super) SecretString);

impl NewPassword {
    /// Parses a password: 8 to 128 characters after NFC, without control characters.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        text::reject_control_chars(raw, LineMode::Single)?;
        let password = text::nfc(raw);
        text::check_length(&password, PASSWORD_LEN)?;
        Ok(Self(password.as_ref().into()))
    }

    /// Rejects a password that equals one of the user's names, compared case-insensitively.
    pub fn check_differs_from(&self, names: &[&str]) -> Result<(), InvalidValue> {
        let folded = text::fold_case(self.0.expose_secret());
        if names.iter().any(|name| text::fold_case(name) == folded) {
            return Err(InvalidValue::new("must not be the username or the email"));
        }
        Ok(())
    }

    /// Returns `true` if both passwords are the same.
    #[must_use]
    pub fn equals(&self, candidate: &CandidatePassword) -> bool {
        candidate
            .0
            .as_ref()
            .is_some_and(|candidate| candidate.expose_secret() == self.0.expose_secret())
    }
}

/// A password that a client presents to prove an identity. `None` if no password can have
/// this text.
#[derive(Clone, Debug)]
pub struct CandidatePassword(pub(super) Option<SecretString>);

impl CandidatePassword {
    /// Accepts any text. A text that is no valid password is a mismatch, after the same work
    /// as any other.
    #[must_use]
    pub fn new(raw: &str) -> Self {
        Self(NewPassword::parse(raw).ok().map(|password| password.0))
    }
}

/// The hash of a password, in the PHC string format.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash(String);

impl PasswordHash {
    /// Wraps a hash from the database.
    #[must_use]
    pub fn from_stored(phc: String) -> Self {
        Self(phc)
    }

    /// Returns the hash as the database stores it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("PasswordHash(…)")
    }
}
