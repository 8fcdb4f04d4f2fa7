//! The settings of keys, tokens and passwords.

use std::path::PathBuf;

use clap::Args;
use secrecy::SecretString;

use super::{
    ConfigError,
    secrets::{load_secret, secret_key},
    values::secret,
};
use crate::{
    auth::{Algorithm, TokenSettings},
    crypto::{hashing, keys::Keyring},
};

/// The largest lifetime of an access token, in minutes: a year.
///
/// Test: `settings_are_rejected_above_their_maximum`.
const MAX_ACCESS_TOKEN_MINUTES: i64 = 365 * 24 * 60;

/// The largest lifetime of an access token with EdDSA, in minutes: 27 days. The key that signs it
/// verifies until the end of the next month, which has at least 28 days.
///
/// Test: `an_eddsa_token_does_not_outlive_its_key`.
const MAX_EDDSA_ACCESS_TOKEN_MINUTES: u32 = 27 * 24 * 60;

/// The largest lifetime of a session, in days: ten years.
///
/// Test: `settings_are_rejected_above_their_maximum`.
const MAX_REFRESH_TOKEN_DAYS: i64 = 3_650;

/// Keys, tokens and passwords.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Tokens")]
pub struct TokenConfig {
    /// Secret that signs the tokens, at least 32 random bytes [default: stored with the embedded PostgreSQL, otherwise required]
    #[arg(long, env, hide_env_values = true, value_parser = secret())]
    pub secret_key: Option<SecretString>,

    /// File that contains SECRET_KEY
    #[arg(long, env)]
    pub secret_key_file: Option<PathBuf>,

    /// Previous SECRET_KEY, which still verifies tokens [default: none]
    #[arg(long, env, hide_env_values = true, value_parser = secret())]
    pub secret_key_previous: Option<SecretString>,

    /// File that contains SECRET_KEY_PREVIOUS
    #[arg(long, env)]
    pub secret_key_previous_file: Option<PathBuf>,

    /// Signature algorithm of access tokens: EdDSA, which other services verify with public keys, or HS256
    #[arg(long, env, default_value = "EdDSA")]
    pub algorithm: Algorithm,

    /// `iss` of access tokens
    #[arg(long, env, default_value = "fast-zero", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub token_issuer: String,

    /// `aud` of access tokens
    #[arg(long, env, default_value = "fast-zero", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub token_audience: String,

    /// Lifetime of an access token, in minutes
    #[arg(long, env, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=MAX_ACCESS_TOKEN_MINUTES))]
    pub access_token_expire_minutes: u32,

    /// Lifetime of a session after its last refresh, in days
    #[arg(long, env, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=MAX_REFRESH_TOKEN_DAYS))]
    pub refresh_token_expire_days: u32,

    /// The argon2 parameters. No setting, which could be below OWASP's minimum.
    #[arg(skip = hashing::default_params())]
    pub argon2_params: argon2::Params,
}

impl TokenConfig {
    /// Reads the files of secrets, each once.
    pub(super) fn load_secrets(&mut self) -> Result<(), ConfigError> {
        load_secret("SECRET_KEY", &mut self.secret_key, &mut self.secret_key_file)?;
        let (value, file) = (&mut self.secret_key_previous, &mut self.secret_key_previous_file);
        load_secret("SECRET_KEY_PREVIOUS", value, file)
    }

    /// Checks that no access token outlives the key that signs it.
    pub(super) fn check_lifetime(&self) -> Result<(), ConfigError> {
        let is_allowed = self.algorithm != Algorithm::EdDsa
            || self.access_token_expire_minutes <= MAX_EDDSA_ACCESS_TOKEN_MINUTES;
        let message = format!(
            "must be at most {MAX_EDDSA_ACCESS_TOKEN_MINUTES} (27 days) if ALGORITHM is EdDSA, not \
             {}",
            self.access_token_expire_minutes
        );
        let setting = "ACCESS_TOKEN_EXPIRE_MINUTES";
        if is_allowed { Ok(()) } else { Err(ConfigError { setting, message }) }
    }

    /// Returns the settings of access tokens.
    pub(crate) fn access_tokens(&self) -> TokenSettings {
        TokenSettings {
            algorithm: self.algorithm,
            issuer: self.token_issuer.clone(),
            audience: self.token_audience.clone(),
            lifetime: time::Duration::minutes(self.access_token_expire_minutes.into()),
        }
    }

    /// Returns the keys; `None` if no current one is set.
    pub(crate) fn keyring(&self) -> Result<Option<Keyring>, ConfigError> {
        let key_of = |setting, secret: &Option<SecretString>| {
            secret.clone().map(|secret| secret_key(setting, secret)).transpose()
        };
        let previous = key_of("SECRET_KEY_PREVIOUS", &self.secret_key_previous)?;
        let current = key_of("SECRET_KEY", &self.secret_key)?;
        Ok(current.map(|current| Keyring::new(current, previous)))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Arguments {
        #[command(flatten)]
        config: TokenConfig,
    }

    #[test]
    fn an_eddsa_token_does_not_outlive_its_key() {
        let check = |algorithm, minutes: u32| {
            let args = [
                "test",
                "--algorithm",
                algorithm,
                "--access-token-expire-minutes",
                &minutes.to_string(),
            ];
            Arguments::try_parse_from(args).expect("valid").config.check_lifetime()
        };
        check("EdDSA", 38_880).expect("27 days");
        check("HS256", 525_600).expect("a year");
        let error = check("EdDSA", 38_881).expect_err("more than 27 days").to_string();
        let expected = "ACCESS_TOKEN_EXPIRE_MINUTES must be at most 38880 (27 days) if ALGORITHM is \
                        EdDSA, not 38881";
        assert_eq!(error, expected);
    }
}
