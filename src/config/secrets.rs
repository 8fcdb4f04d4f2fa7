//! Secrets, from a variable or a file.

use std::{
    fs,
    path::{Path, PathBuf},
};

use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgConnectOptions;

use super::ConfigError;
use crate::{
    crypto::keys::{MIN_SECRET_BYTES, SecretKey},
    database::url,
    types::{error_chain::ErrorChain, secret_text::display_path},
};

/// Returns a secret from its variable or from a file. An empty variable counts as not set: compose
/// passes an unset one as an empty one.
fn read_secret(
    setting: &'static str,
    value: Option<&SecretString>,
    file: Option<&Path>,
) -> Result<Option<SecretString>, ConfigError> {
    let value = value.filter(|value| !value.expose_secret().is_empty());
    let file = file.filter(|file| !file.as_os_str().is_empty());
    let Some(file) = file else {
        return Ok(value.cloned());
    };
    let error = |message| ConfigError { setting, message };
    if value.is_some() {
        return Err(error(format!("and {setting}_FILE are both set: unset one of them")));
    }
    let text = fs::read_to_string(file).map_err(|source| {
        error(format!("cannot be read from {setting}_FILE, {}: {source}", display_path(file)))
    })?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() {
        return Err(error(format!("is empty in {setting}_FILE, {}", display_path(file))));
    }
    Ok(Some(text.into()))
}

/// Replaces a file by the secret in it. It is read once, because it may be a pipe.
pub(super) fn load_secret(
    setting: &'static str,
    value: &mut Option<SecretString>,
    file: &mut Option<PathBuf>,
) -> Result<(), ConfigError> {
    *value = read_secret(setting, value.as_ref(), file.as_deref())?;
    *file = None;
    Ok(())
}

pub(super) fn secret_key(
    setting: &'static str,
    secret: SecretString,
) -> Result<SecretKey, ConfigError> {
    SecretKey::new(secret).ok_or_else(|| ConfigError {
        setting,
        message: format!(
            "must have at least {MIN_SECRET_BYTES} random bytes: `openssl rand -base64 32` \
             generates some"
        ),
    })
}

pub(super) fn parse_database_url(text: &str) -> Result<PgConnectOptions, ConfigError> {
    url::parse_url(text).map_err(|error| ConfigError {
        setting: "DATABASE_URL",
        message: format!(
            "must be like postgresql://user:password@host:5432/database: {}",
            ErrorChain(&*error)
        ),
    })
}
