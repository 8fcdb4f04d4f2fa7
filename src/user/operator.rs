//! Users as an operator of the service sees them: everything but the password.

use time::OffsetDateTime;

use crate::types::id::UserId;

/// An account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    /// The ID of the user.
    pub(crate) id: UserId,
    /// The username, in the user's spelling.
    pub(crate) username: String,
    /// The email address.
    pub(crate) email: String,
    /// The time when the username or the email address was last updated.
    pub(crate) updated_at: OffsetDateTime,
    /// The time when an operator disabled the user; `None` if the user is not disabled.
    pub(crate) disabled_at: Option<OffsetDateTime>,
}

/// The numbers of what an account has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AccountCounts {
    /// The number of todos.
    pub(crate) todos: i64,
    /// The number of active sessions.
    pub(crate) active_sessions: i64,
    /// The number of personal access tokens that have not expired.
    pub(crate) personal_access_tokens: i64,
    /// The time when the open reset code expires; `None` if there is none.
    pub(crate) reset_code_expires_at: Option<OffsetDateTime>,
}
