//! Why a cursor of changes has expired.

/// Why a cursor has expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpiredCursor {
    /// It is too old.
    Age,
    /// The database was restored.
    Restored,
    /// The database has lost the changes before the cursor.
    Future,
    /// It was made with a key that the service does not have.
    Key,
}

impl ExpiredCursor {
    /// Returns `cause` in the metadata of the error.
    pub(super) fn cause(self) -> Option<&'static str> {
        match self {
            Self::Age => None,
            Self::Restored => Some("RESTORED"),
            Self::Future => Some("FUTURE"),
            Self::Key => Some("KEY"),
        }
    }
}

/// For how many days a cursor of changes is valid: one day less than a deletion stays known, so that
/// the clocks of replicas may differ.
///
/// Test: `a_cursor_expires_after_thirty_days`.
pub const MAX_CURSOR_AGE_DAYS: i64 = 30;
