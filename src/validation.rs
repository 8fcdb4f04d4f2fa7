//! What is wrong with the fields of a request: parsing goes through all of them, so
//! that the caller is told of every fault at once.

use std::borrow::Cow;

use crate::error::Error;

/// Why a value is refused: what is allowed instead, to be read after the field's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid(Cow<'static, str>);

impl Invalid {
    /// A reason that is the same for all values.
    #[must_use]
    pub const fn new(allowed: &'static str) -> Self {
        Self(Cow::Borrowed(allowed))
    }
}

impl From<String> for Invalid {
    fn from(allowed: String) -> Self {
        Self(Cow::Owned(allowed))
    }
}

/// Why an empty field is refused that must not be.
pub const REQUIRED: Invalid = Invalid::new("must be set");

/// Collects the fields of one request that are refused.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Violations(Vec<(&'static str, Invalid)>);

impl Violations {
    /// Passes a good value on and takes note of a bad one. `field` is the path in
    /// the request, such as `todo.title`.
    pub fn check<T>(&mut self, field: &'static str, value: Result<T, Invalid>) -> Option<T> {
        value.map_err(|invalid| self.add(field, invalid)).ok()
    }

    /// Takes note of a bad field.
    pub fn add(&mut self, field: &'static str, invalid: Invalid) {
        self.0.push((field, invalid));
    }

    /// Puts the checked values together, which all are there if none was refused.
    pub fn finish<T>(self, assemble: impl FnOnce() -> Option<T>) -> Result<T, Error> {
        if !self.0.is_empty() {
            return Err(Error::InvalidRequest(self));
        }
        assemble().ok_or_else(|| Error::internal("a field was refused without a violation"))
    }

    /// One bad field, where there can be no other.
    #[must_use]
    pub fn single(field: &'static str, invalid: Invalid) -> Self {
        Self(vec![(field, invalid)])
    }

    /// The bad fields, each with what is allowed.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(field, Invalid(allowed))| (*field, allowed.as_ref()))
    }
}
