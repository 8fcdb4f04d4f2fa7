//! Access tokens (JWT, RFC 9068) and refresh tokens.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use crate::{
    crypto::keys::{Keyring, MAC_BYTES, MacKeys},
    rpc::{
        caller::{Caller, VerifiedToken},
        error::Error,
    },
    types::id::{SessionId, UserId},
};

/// How long an access token is accepted after it has expired: the maximum difference between the
/// clocks of replicas, which all follow the clock of the database.
///
/// Test: `an_access_token_is_valid_until_it_expires`.
pub(crate) const TOKEN_LEEWAY: Duration = Duration::seconds(5);

/// The `typ` of an access token (RFC 9068, section 2.1).
const ACCESS_TOKEN_TYPE: &str = "at+jwt";

/// Issues and verifies access tokens.
pub struct AccessTokens {
    header: Header,
    signing: EncodingKey,
    verification_keys: Vec<DecodingKey>,
    validation: Validation,
    issuer: String,
    audience: String,
    lifetime: Duration,
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
    /// Creates an issuer that signs with the raw current secret of the keyring and verifies
    /// with all of its secrets.
    #[must_use]
    pub fn new(keyring: &Keyring, issuer: &str, audience: &str, lifetime: Duration) -> Self {
        let mut header = Header::new(Algorithm::HS256);
        header.typ = Some(ACCESS_TOKEN_TYPE.to_owned());
        header.kid = Some(keyring.current.key_id());

        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_issuer(&[issuer]);
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        validation.leeway = TOKEN_LEEWAY.whole_seconds().unsigned_abs();
        validation.validate_nbf = true;
        // `verify` checks `exp` last, so that only an otherwise valid token is reported as
        // expired.
        validation.validate_exp = false;

        Self {
            header,
            signing: EncodingKey::from_secret(keyring.current.as_bytes()),
            verification_keys: keyring
                .verification_keys()
                .map(|key| DecodingKey::from_secret(key.as_bytes()))
                .collect(),
            validation,
            issuer: issuer.to_owned(),
            audience: audience.to_owned(),
            lifetime,
        }
    }

    /// Issues a token. Returns the token and the time when it expires.
    pub fn issue(
        &self,
        caller: Caller,
        now: OffsetDateTime,
    ) -> Result<(String, OffsetDateTime), Error> {
        let exp = (now + self.lifetime).unix_timestamp();
        let claims = Claims {
            iss: self.issuer.clone(),
            aud: self.audience.clone(),
            sub: caller.user_id.to_string(),
            sid: caller.session_id.to_string(),
            jti: Uuid::now_v7().to_string(),
            iat: now.unix_timestamp(),
            exp,
        };
        let token =
            jsonwebtoken::encode(&self.header, &claims, &self.signing).map_err(Error::internal)?;
        Ok((token, OffsetDateTime::from_unix_timestamp(exp).map_err(Error::internal)?))
    }

    /// Verifies a token, but not whether its session is active.
    ///
    /// # Errors
    ///
    /// Returns [`Error::TokenExpired`] if an otherwise valid token is expired, and
    /// [`Error::TokenInvalid`] for all other invalid tokens.
    pub fn verify(&self, token: &str, now: OffsetDateTime) -> Result<VerifiedToken, Error> {
        let decode = |key| jsonwebtoken::decode::<Claims>(token, key, &self.validation).ok();
        let data = self.verification_keys.iter().find_map(decode).ok_or(Error::TokenInvalid)?;
        let typ = data.header.typ.as_deref().unwrap_or_default();
        // A token with `crit` is invalid, because the service supports no extension (RFC 7515,
        // section 4.1.11).
        if !typ.eq_ignore_ascii_case(ACCESS_TOKEN_TYPE) || data.header.crit.is_some() {
            return Err(Error::TokenInvalid);
        }
        let claims = data.claims;
        let verified = VerifiedToken {
            caller: Caller {
                user_id: UserId::parse(&claims.sub).map_err(|_| Error::TokenInvalid)?,
                session_id: SessionId::parse(&claims.sid).map_err(|_| Error::TokenInvalid)?,
            },
            expires_at: OffsetDateTime::from_unix_timestamp(claims.exp)
                .map_err(|_| Error::TokenInvalid)?,
        };
        if claims.exp.saturating_add(TOKEN_LEEWAY.whole_seconds()) <= now.unix_timestamp() {
            return Err(Error::TokenExpired { server_time: now });
        }
        Ok(verified)
    }
}

impl std::fmt::Debug for AccessTokens {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("AccessTokens").finish_non_exhaustive()
    }
}

/// Issues and verifies refresh tokens. A refresh token consists of the user ID, the session
/// ID, the generation, and a message authentication code of the three: 256 bits that an
/// attacker can neither guess nor find in the database.
#[derive(Clone, Debug)]
pub struct RefreshTokens(MacKeys);

/// The contents of a refresh token that this service issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefreshToken {
    /// The user and the session that the token belongs to.
    pub caller: Caller,
    /// The number of refresh tokens that the session had before this one.
    pub generation: i32,
}

const ID_BYTES: usize = 16;
const GENERATION_BYTES: usize = 4;

impl RefreshTokens {
    /// Creates an issuer whose keys are derived for refresh tokens only.
    #[must_use]
    pub fn new(keyring: &Keyring) -> Self {
        Self(keyring.derive("refresh tokens"))
    }

    /// Issues the token of a generation. The same input always yields the same token.
    #[must_use]
    pub fn issue(&self, token: RefreshToken) -> String {
        let user_id = token.caller.user_id.as_uuid();
        let session_id = token.caller.session_id.as_uuid();
        let generation = token.generation.to_be_bytes();
        let payload = [&user_id.as_bytes()[..], session_id.as_bytes(), &generation].concat();
        let mac = self.0.sign(&[&payload]);
        URL_SAFE_NO_PAD.encode([&payload[..], &mac].concat())
    }

    /// Verifies a token. Returns `None` if the token was not issued by this service.
    #[must_use]
    pub fn verify(&self, token: &str) -> Option<RefreshToken> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (payload, mac) = bytes.split_at_checked(bytes.len().checked_sub(MAC_BYTES)?)?;
        if payload.len() != 2 * ID_BYTES + GENERATION_BYTES || !self.0.verify(&[payload], mac) {
            return None;
        }
        let (user_id, rest) = payload.split_at(ID_BYTES);
        let (session_id, generation) = rest.split_at(ID_BYTES);
        let caller = Caller {
            user_id: UserId::from_uuid(Uuid::from_slice(user_id).ok()?),
            session_id: SessionId::from_uuid(Uuid::from_slice(session_id).ok()?),
        };
        Some(RefreshToken { caller, generation: i32::from_be_bytes(generation.try_into().ok()?) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{crypto::keys::SigningKey, types::clock::Clock};

    fn key(byte: char) -> SigningKey {
        SigningKey::new(byte.to_string().repeat(32).into()).expect("long enough")
    }

    fn keyring() -> Keyring {
        Keyring::new(key('k'), None)
    }

    fn caller() -> Caller {
        Caller { user_id: UserId::any(), session_id: SessionId::any() }
    }

    fn tokens() -> AccessTokens {
        AccessTokens::new(&keyring(), "fast-zero", "fast-zero", Duration::minutes(30))
    }

    #[test]
    fn an_access_token_is_valid_until_it_expires() {
        let (tokens, caller, now) = (tokens(), caller(), Clock::default().now());
        let (token, expires_at) = tokens.issue(caller, now).expect("a token");
        assert_eq!(
            tokens.verify(&token, now).expect("valid"),
            VerifiedToken { caller, expires_at }
        );
        let just_before = expires_at + Duration::seconds(4);
        assert!(tokens.verify(&token, just_before).is_ok());
        let after_leeway = expires_at + Duration::seconds(5);
        assert!(matches!(tokens.verify(&token, after_leeway), Err(Error::TokenExpired { .. })));
    }

    #[test]
    fn the_previous_secret_verifies_but_does_not_sign() {
        let old = tokens();
        let tokens = |previous| {
            let keyring = Keyring::new(key('n'), previous);
            AccessTokens::new(&keyring, "fast-zero", "fast-zero", Duration::minutes(30))
        };
        let (both, new) = (tokens(Some(key('k'))), tokens(None));
        let now = Clock::default().now();
        let (token, _) = old.issue(caller(), now).expect("a token");
        assert!(both.verify(&token, now).is_ok());
        assert!(new.verify(&token, now).is_err());
        let (token, _) = both.issue(caller(), now).expect("a token");
        assert!(new.verify(&token, now).is_ok());
        assert!(old.verify(&token, now).is_err());
    }

    proptest! {
        #[test]
        fn issued_refresh_tokens_are_valid(generation: i32) {
            let tokens = RefreshTokens::new(&keyring());
            let token = RefreshToken { caller: caller(), generation };
            prop_assert_eq!(tokens.verify(&tokens.issue(token)), Some(token));
        }

        #[test]
        fn a_modified_refresh_token_is_invalid(at: prop::sample::Index, flip in 1u8..) {
            let tokens = RefreshTokens::new(&keyring());
            let token = tokens.issue(RefreshToken { caller: caller(), generation: 0 });
            let mut bytes = URL_SAFE_NO_PAD.decode(&token).expect("our own token");
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert_eq!(tokens.verify(&URL_SAFE_NO_PAD.encode(bytes)), None);
        }

        #[test]
        fn issued_access_tokens_are_valid(user: u128, session: u128, age in 0_i64..30 * 60) {
            let caller = Caller {
                user_id: UserId::from_uuid(Uuid::from_u128(user)),
                session_id: SessionId::from_uuid(Uuid::from_u128(session)),
            };
            let (tokens, now) = (tokens(), Clock::default().now());
            let (token, expires_at) = tokens.issue(caller, now).expect("a token");
            let verified = tokens.verify(&token, now + Duration::seconds(age)).expect("valid");
            prop_assert_eq!(verified, VerifiedToken { caller, expires_at });
        }

        #[test]
        fn a_modified_access_token_is_invalid(at: prop::sample::Index, byte in "[-A-Za-z0-9_.=é]") {
            let (tokens, now) = (tokens(), Clock::default().now());
            let (token, _) = tokens.issue(caller(), now).expect("a token");
            let at = at.index(token.len());
            let modified = format!("{}{byte}{}", &token[..at], &token[at + 1..]);
            prop_assert_eq!(tokens.verify(&modified, now).is_ok(), modified == token);
            let extended = format!("{}{byte}{}", &token[..at], &token[at..]);
            prop_assert!(tokens.verify(&extended, now).is_err());
        }

        #[test]
        fn signed_claims_are_accepted_or_rejected(
            exp in prop_oneof![any::<i64>(), -10_i64..10], sub: String, sid: String, valid: bool
        ) {
            let (tokens, now) = (tokens(), Clock::default().now());
            let exp = if (-10..10).contains(&exp) { now.unix_timestamp() + exp } else { exp };
            let id = || Uuid::now_v7().to_string();
            let (sub, sid) = if valid { (id(), id()) } else { (sub, sid) };
            let (iss, aud) = ("fast-zero".to_owned(), "fast-zero".to_owned());
            let claims = Claims { iss, aud, sub, sid, jti: String::new(), iat: i64::MIN, exp };
            let token = jsonwebtoken::encode(&tokens.header, &claims, &tokens.signing);
            let is_valid_time = OffsetDateTime::from_unix_timestamp(exp).is_ok();
            match tokens.verify(&token.expect("a token"), now) {
                Ok(verified) => {
                    prop_assert!(valid && exp > now.unix_timestamp() - TOKEN_LEEWAY.whole_seconds());
                    prop_assert_eq!(verified.expires_at.unix_timestamp(), exp);
                }
                Err(Error::TokenExpired { .. }) => {
                    prop_assert!(valid && exp <= now.unix_timestamp() - TOKEN_LEEWAY.whole_seconds());
                }
                Err(Error::TokenInvalid) => prop_assert!(!(valid && is_valid_time)),
                Err(other) => prop_assert!(false, "{other}"),
            }
        }

        #[test]
        fn garbage_is_not_a_token(text in "\\PC{0,120}") {
            prop_assert_eq!(RefreshTokens::new(&keyring()).verify(&text), None);
            prop_assert!(tokens().verify(&text, Clock::default().now()).is_err());
        }
    }
}
