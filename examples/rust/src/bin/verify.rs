//! Verifies access tokens with the public keys of fast-zero, without a call of it.
//!
//! [`Verifier`] is meant to be copied.

use std::{env, process::ExitCode, time::Duration};

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header, jwk::JwkSet};
use serde::Deserialize;
use tokio::{sync::Mutex, time::Instant};
use tower::BoxError;

/// How long the key set is valid.
const MAX_AGE: Duration = Duration::from_hours(1);

/// The minimum time between fetches after the first one, also if they fail.
const FETCH_INTERVAL: Duration = Duration::from_mins(1);
const FETCH_TIMEOUT: Duration = Duration::from_secs(3);

/// The claims of an access token.
#[derive(Debug, Deserialize)]
struct Claims {
    sub: String,
    sid: String,
}

/// The last key set that a fetch returned. It stays in use while fetches fail.
struct KeySet {
    keys: JwkSet,
    expires_at: Instant,
    /// When the next fetch is allowed.
    next_fetch_at: Instant,
}

/// Verifies access tokens.
struct Verifier {
    url: String,
    validation: Validation,
    key_set: Mutex<KeySet>,
}

impl Verifier {
    /// Fetches the keys. A service does that before it serves.
    async fn new(url: String, issuer: &str, audience: &str) -> Result<Self, BoxError> {
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_issuer(&[issuer]);
        validation.set_audience(&[audience]);
        validation.set_required_spec_claims(&["iss", "aud", "exp", "sub"]);
        validation.validate_nbf = true;
        validation.leeway = 5;
        let (keys, now) = (fetch(&url).await?, Instant::now());
        let key_set = KeySet { keys, expires_at: now + MAX_AGE, next_fetch_at: now };
        Ok(Self { url, validation, key_set: Mutex::new(key_set) })
    }

    /// Returns the claims of a valid access token.
    async fn verify(&self, token: &str) -> Result<Claims, BoxError> {
        let header = decode_header(token)?;
        if header.typ.as_deref() != Some("at+jwt") || header.crit.is_some() {
            return Err("not an access token".into());
        }
        let key = self.key(&header.kid.unwrap_or_default()).await?;
        Ok(decode(token, &key, &self.validation)?.claims)
    }

    /// Returns the key with this ID.
    async fn key(&self, kid: &str) -> Result<DecodingKey, BoxError> {
        let (mut key_set, now) = (self.key_set.lock().await, Instant::now());
        let is_stale = now >= key_set.expires_at || key_set.keys.find(kid).is_none();
        if is_stale && now >= key_set.next_fetch_at {
            key_set.next_fetch_at = now + FETCH_INTERVAL;
            // Other calls use the last set meanwhile.
            drop(key_set);
            let fetched = fetch(&self.url).await;
            key_set = self.key_set.lock().await;
            match fetched {
                Ok(keys) => (key_set.keys, key_set.expires_at) = (keys, Instant::now() + MAX_AGE),
                Err(error) => eprintln!("failed to fetch the keys: {error}"),
            }
        }
        Ok(DecodingKey::from_jwk(key_set.keys.find(kid).ok_or("unknown key")?)?)
    }
}

async fn fetch(url: &str) -> Result<JwkSet, BoxError> {
    let client = reqwest::Client::builder().timeout(FETCH_TIMEOUT).build()?;
    Ok(client.get(url).send().await?.error_for_status()?.json().await?)
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let url = env::var("FASTZERO_JWKS_URL")
        .unwrap_or_else(|_| "http://localhost:9464/.well-known/jwks.json".to_owned());
    let verifier = Verifier::new(url, "fast-zero", "fast-zero").await?;
    let mut exit_code = ExitCode::SUCCESS;
    for token in env::args().skip(1) {
        match verifier.verify(&token).await {
            Ok(claims) => println!("user: {}\nsession: {}", claims.sub, claims.sid),
            Err(error) => {
                eprintln!("invalid token: {error}");
                exit_code = ExitCode::FAILURE;
            }
        }
    }
    Ok(exit_code)
}
