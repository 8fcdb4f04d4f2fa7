//! The invalid fields of a request. Parsing checks all fields, so that one error names every
//! invalid one.

use std::fmt;

use crate::types::invalid::InvalidValue;

/// The reason for a required field that is empty.
pub const REQUIRED: InvalidValue = InvalidValue::new("must be set");

/// The invalid fields of one request, in the order of the checks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct FieldViolations(Vec<(&'static str, InvalidValue)>);

impl FieldViolations {
    /// Returns a valid value, or records a violation. `field` is the path in the request, such
    /// as `todo.title`.
    pub fn check<T>(&mut self, field: &'static str, value: Result<T, InvalidValue>) -> Option<T> {
        value.map_err(|invalid| self.add(field, invalid)).ok()
    }

    /// Records a violation.
    pub fn add(&mut self, field: &'static str, invalid: InvalidValue) {
        self.0.push((field, invalid));
    }

    /// Adds other violations.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Assembles the values, which are all there if no field is invalid.
    ///
    /// # Errors
    /// The violations. They are empty if `assemble` returned `None` without one, which is a bug
    /// of the parser.
    pub fn finish<T>(self, assemble: impl FnOnce() -> Option<T>) -> Result<T, Self> {
        if self.0.is_empty() { assemble().ok_or(self) } else { Err(self) }
    }

    /// Creates the violations of a request with one invalid field.
    #[must_use]
    pub fn single(field: &'static str, invalid: InvalidValue) -> Self {
        Self(vec![(field, invalid)])
    }

    /// Returns `true` if no field is invalid.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the invalid fields, each with what is allowed.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(field, invalid)| (*field, invalid.as_str()))
    }
}

/// `: todo.title must be set; page_size must not be negative`
impl fmt::Display for FieldViolations {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().enumerate().try_for_each(|(index, (field, allowed))| {
            let separator = if index == 0 { ": " } else { "; " };
            write!(formatter, "{separator}{field} {allowed}")
        })
    }
}
