//! The audit trail: events of accounts and sessions, as log lines with a target of their own.
//! The span of the call adds the request id and the client's address. Lines name users by ID,
//! never by username or email.

use crate::types::id::{PersonalAccessTokenId, SessionId, UserId};

/// The target of audit lines.
pub(crate) const TARGET: &str = "fast_zero::audit";

/// Logs an event. `user_id` is `None` if no user has the login that was given, or if the
/// database was not queried, as for a login that a lockout rejects.
pub(crate) fn record(event: &'static str, user_id: Option<UserId>, session_id: Option<SessionId>) {
    let user_id = user_id.map(tracing::field::display);
    let session_id = session_id.map(tracing::field::display);
    tracing::info!(target: TARGET, event, user_id, session_id, "audit");
}

/// Logs an event of a personal access token, and the session of the user that caused it.
pub(crate) fn record_personal_access_token(
    event: &'static str,
    user_id: UserId,
    session_id: SessionId,
    id: PersonalAccessTokenId,
) {
    tracing::info!(
        target: TARGET,
        event,
        %user_id,
        %session_id,
        personal_access_token_id = %id,
        "audit"
    );
}
