//! Access tokens (JWT, RFC 9068).

use jsonwebtoken::{Header, Validation};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::{
    TOKEN_LEEWAY,
    signing_keys::{Algorithm, SigningKeys},
    verified_tokens::{TokenHash, ValidToken, VerifiedTokens},
};
use crate::{
    crypto::{keys::Keyring, month_key::PublicKey},
    rpc::{
        caller::{SessionCaller, VerifiedToken},
        error::Error,
    },
    types::id::{SessionId, UserId},
};

/// The `typ` of an access token (RFC 9068, section 2.1).
const ACCESS_TOKEN_TYPE: &str = "at+jwt";

/// Issues and verifies access tokens.
pub struct AccessTokens {
    keys: SigningKeys,
    verified: VerifiedTokens,
    settings: TokenSettings,
}

/// The settings of access tokens.
#[derive(Clone, Debug)]
pub struct TokenSettings {
    /// The algorithm of new tokens.
    pub algorithm: Algorithm,
    /// The `iss` of all tokens.
    pub issuer: String,
    /// The `aud` of all tokens.
    pub audience: String,
    /// The time from `iat` to `exp` of new tokens.
    pub lifetime: Duration,
}

/// The claims of an access token.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    sub: String,
    sid: String,
    jti: String,
    iat: i64,
    exp: i64,
}

impl AccessTokens {
    /// Creates an issuer that signs with the current secret of the keyring, and verifies with all of
    /// its secrets.
    #[must_use]
    pub fn new(keyring: Keyring, settings: TokenSettings) -> Self {
        let keys = SigningKeys::new(keyring, settings.algorithm);
        Self { keys, verified: VerifiedTokens::new(), settings }
    }

    /// Issues a token. Returns the token and the time when it expires.
    pub fn issue(
        &self,
        caller: SessionCaller,
        now: OffsetDateTime,
    ) -> Result<(String, OffsetDateTime), Error> {
        let exp = (now + self.settings.lifetime).unix_timestamp();
        let claims = Claims {
            iss: self.settings.issuer.clone(),
            aud: self.settings.audience.clone(),
            sub: caller.user_id.to_string(),
            sid: caller.session_id.to_string(),
            jti: Uuid::now_v7().to_string(),
            iat: now.unix_timestamp(),
            exp,
        };
        let token = self.sign(&claims, now).map_err(Error::internal)?;
        Ok((token, OffsetDateTime::from_unix_timestamp(exp).map_err(Error::internal)?))
    }

    fn sign(&self, claims: &Claims, now: OffsetDateTime) -> jsonwebtoken::errors::Result<String> {
        let keys = self.keys.at(now);
        let mut header = Header::new(keys.signing.algorithm.header());
        header.typ = Some(ACCESS_TOKEN_TYPE.to_owned());
        header.kid = Some(keys.signing.kid.clone());
        jsonwebtoken::encode(&header, claims, &keys.signing.key)
    }

    /// Verifies a token, but not whether its session is active.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TokenExpired`] if an otherwise valid token is expired, and
    /// [`Error::TokenInvalid`] for all other invalid tokens.
    pub fn verify(&self, token: &str, now: OffsetDateTime) -> Result<VerifiedToken, Error> {
        let hash = TokenHash::new(token);
        if let Some(verified) = self.verified.get(&hash, now) {
            return Ok(verified);
        }
        let valid = self.verify_signature(token, now).ok_or(Error::TokenInvalid)?;
        // Last, so that only an otherwise valid token is reported as expired.
        if !valid.is_valid_at(now) {
            return Err(Error::TokenExpired { server_time: now });
        }
        self.verified.insert(hash, valid);
        Ok(valid.token)
    }

    /// Verifies everything but the expiry of a token.
    fn verify_signature(&self, token: &str, now: OffsetDateTime) -> Option<ValidToken> {
        let header = jsonwebtoken::decode_header(token).ok()?;
        let typ = header.typ.as_deref().unwrap_or_default();
        // A token with `crit` is invalid, because the service supports no extension (RFC 7515,
        // section 4.1.11).
        if !typ.eq_ignore_ascii_case(ACCESS_TOKEN_TYPE) || header.crit.is_some() {
            return None;
        }
        let keys = self.keys.at(now);
        let key = keys.find(&header.kid?)?;
        let validation = self.settings.validation(key.algorithm);
        let claims = jsonwebtoken::decode::<Claims>(token, &key.key, &validation).ok()?.claims;
        let token = VerifiedToken {
            caller: SessionCaller {
                user_id: UserId::parse(&claims.sub).ok()?,
                session_id: SessionId::parse(&claims.sid).ok()?,
            },
            expires_at: OffsetDateTime::from_unix_timestamp(claims.exp).ok()?,
        };
        Some(ValidToken { token, key: key.lifetime })
    }

    /// Returns the public keys that verify tokens now.
    pub fn published_keys(&self, now: OffsetDateTime) -> Vec<PublicKey> {
        self.keys.published(now)
    }

    /// Returns the public keys that verify tokens now as a JWK set, in JSON.
    pub fn jwk_set(&self, now: OffsetDateTime) -> String {
        self.keys.jwk_set(now)
    }
}

impl TokenSettings {
    /// Returns the checks of a token. The key has determined the algorithm, not the token.
    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm.header());
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.leeway = TOKEN_LEEWAY.whole_seconds().unsigned_abs();
        validation.validate_nbf = true;
        // `verify` checks `exp`.
        validation.validate_exp = false;
        validation
    }
}

impl std::fmt::Debug for AccessTokens {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("AccessTokens").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
