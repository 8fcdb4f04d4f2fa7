//! What is wrong with the fields of a request. Parsing goes through all of them, so that one
//! error names every invalid field.

use crate::types::invalid::InvalidValue;

/// The reason for a required field that is empty.
pub const REQUIRED: InvalidValue = InvalidValue::new("must be set");

/// The invalid fields of one request, in the order in which they were checked.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FieldViolations(Vec<(&'static str, InvalidValue)>);

impl FieldViolations {
    /// Returns a valid value, or records a violation. `field` is the path in the request,
    /// such as `todo.title`.
    pub fn check<T>(&mut self, field: &'static str, value: Result<T, InvalidValue>) -> Option<T> {
        value.map_err(|invalid| self.add(field, invalid)).ok()
    }

    /// Records a violation.
    pub fn add(&mut self, field: &'static str, invalid: InvalidValue) {
        self.0.push((field, invalid));
    }

    /// Assembles the checked values, which are all there if there was no violation.
    ///
    /// # Errors
    /// The violations. They are empty if `assemble` returned `None` without one, which is a
    /// bug of the parser.
    pub fn finish<T>(self, assemble: impl FnOnce() -> Option<T>) -> Result<T, Self> {
        if self.0.is_empty() { assemble().ok_or(self) } else { Err(self) }
    }

    /// Creates the list of a request with one invalid field.
    #[must_use]
    pub fn single(field: &'static str, invalid: InvalidValue) -> Self {
        Self(vec![(field, invalid)])
    }

    /// Returns `true` if there is no violation.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the invalid fields, each with what is allowed.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(field, invalid)| (*field, invalid.as_str()))
    }
}
