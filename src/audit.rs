//! The audit trail: what happens to accounts and sessions, in the log, under a target of
//! its own. The call around it gives the request's id and the peer. Who is meant is told
//! by id, never by name or address.

use crate::types::id::{SessionId, UserId};

/// What audit lines are logged under, to be told from the others.
pub const TARGET: &str = "fast_zero::audit";

/// Writes a line. Where no user is named, nobody has the name that was given, or, as when a
/// lock refuses, nobody has looked who it is.
pub fn record(event: &'static str, user_id: Option<UserId>, session_id: Option<SessionId>) {
    let user_id = user_id.map(tracing::field::display);
    let session_id = session_id.map(tracing::field::display);
    tracing::info!(target: TARGET, event, user_id, session_id, "audit");
}
