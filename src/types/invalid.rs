//! Why a single value is rejected.

use std::borrow::Cow;

/// Why a value is rejected: what is allowed instead, to be read after the field's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidValue(Cow<'static, str>);

impl InvalidValue {
    /// Creates a reason that is the same for all values.
    #[must_use]
    pub const fn new(allowed: &'static str) -> Self {
        Self(Cow::Borrowed(allowed))
    }

    /// Returns the text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for InvalidValue {
    fn from(allowed: String) -> Self {
        Self(Cow::Owned(allowed))
    }
}
