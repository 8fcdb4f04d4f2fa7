//! Disabled users: an operator takes all credentials of a user away, and rejects new ones.
//!
//! Replicas see it when they look up a session or a token the next time.

pub(crate) use super::store::{
    DeletedCredentials,
    disabled_users::{Disabled, Enabled},
};

use super::store::disabled_users;
use crate::{database::Database, rpc::error::Error, telemetry::audit, types::id::UserId};

/// Disables a user, and deletes the user's sessions, personal access tokens and open reset code. A
/// user who is disabled already stays so since then. Returns `None` if the user does not exist.
///
/// # Errors
/// Those of the database.
pub(crate) async fn disable(database: &Database, id: UserId) -> Result<Option<Disabled>, Error> {
    let disabled = disabled_users::disable(database, id).await?;
    if disabled.is_some() {
        audit::record("user_disabled", Some(id), None);
    }
    Ok(disabled)
}

/// Enables a user. Returns `None` if the user does not exist.
///
/// # Errors
/// Those of the database.
pub(crate) async fn enable(database: &Database, id: UserId) -> Result<Option<Enabled>, Error> {
    let enabled = disabled_users::enable(database, id).await?;
    if enabled.is_some_and(|enabled| enabled.was_disabled) {
        audit::record("user_enabled", Some(id), None);
    }
    Ok(enabled)
}
