//! The keys of access tokens: which one signs, and which ones verify, at a given time.
//!
//! With EdDSA, the key of this month signs. The keys of the previous month, this month and the next
//! month verify and are published, for each secret. With HS256, the secret signs. Both kinds always
//! verify, so that a change of the algorithm invalidates no token.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use clap::ValueEnum;
use jsonwebtoken::{DecodingKey, EncodingKey};
use serde_json::json;
use time::OffsetDateTime;

use crate::crypto::{
    keys::{Keyring, SecretKey},
    month_key::{Month, MonthKey, PublicKey},
};

/// The signature algorithm of access tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Algorithm {
    /// Ed25519 (RFC 8037): other services verify the tokens with the public key.
    #[value(name = "EdDSA")]
    EdDsa,
    /// HMAC with SHA-256 (RFC 7518, section 3.2): only the holder of the secret can verify.
    #[value(name = "HS256")]
    Hs256,
}

impl Algorithm {
    /// Returns the algorithm for the header of a token.
    pub(super) fn header(self) -> jsonwebtoken::Algorithm {
        match self {
            Self::EdDsa => jsonwebtoken::Algorithm::EdDSA,
            Self::Hs256 => jsonwebtoken::Algorithm::HS256,
        }
    }
}

/// The time in which a key verifies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyLifetime {
    /// While the service has the secret.
    Secret,
    /// From the month before this one to the month after it.
    Month(Month),
}

impl KeyLifetime {
    pub(super) fn contains(self, now: OffsetDateTime) -> bool {
        match self {
            Self::Secret => true,
            Self::Month(month) => month.verifies_in(Month::at(now)),
        }
    }
}

/// A key that signs.
pub(super) struct PrivateKey {
    pub(super) kid: String,
    pub(super) algorithm: Algorithm,
    pub(super) key: EncodingKey,
}

/// A key that verifies tokens of one algorithm.
pub(super) struct VerificationKey {
    kid: String,
    pub(super) algorithm: Algorithm,
    pub(super) key: DecodingKey,
    pub(super) lifetime: KeyLifetime,
}

/// All keys of a month.
pub(super) struct KeySet {
    month: Month,
    pub(super) signing: PrivateKey,
    verification: Vec<VerificationKey>,
    published: Vec<PublicKey>,
    /// The published keys in JSON.
    jwk_set: String,
}

impl KeySet {
    fn derive(keyring: &Keyring, algorithm: Algorithm, month: Month) -> Self {
        let month_keys: Vec<_> = keyring
            .verification_keys()
            .flat_map(|secret| month.verifying().map(|month| MonthKey::derive(secret, month)))
            .collect();
        let signing = match algorithm {
            Algorithm::EdDsa => PrivateKey::eddsa(MonthKey::derive(&keyring.current, month)),
            Algorithm::Hs256 => PrivateKey::hs256(&keyring.current),
        };
        let published: Vec<_> = month_keys.iter().map(|key| key.public.clone()).collect();
        let jwk_set = jwk_set(&published);
        let secrets = keyring.verification_keys().map(VerificationKey::hs256);
        let verification = month_keys.into_iter().map(VerificationKey::eddsa).chain(secrets);
        Self { month, signing, verification: verification.collect(), published, jwk_set }
    }

    /// Finds the key of a token by the `kid` in its header. The `kid` is public, and it alone
    /// decides the algorithm.
    pub(super) fn find(&self, kid: &str) -> Option<&VerificationKey> {
        self.verification.iter().find(|key| key.kid == kid)
    }
}

impl PrivateKey {
    fn eddsa(key: MonthKey) -> Self {
        Self { kid: key.public.kid, algorithm: Algorithm::EdDsa, key: key.signing }
    }

    fn hs256(secret: &SecretKey) -> Self {
        let key = EncodingKey::from_secret(secret.as_bytes());
        Self { kid: secret.key_id(), algorithm: Algorithm::Hs256, key }
    }
}

impl VerificationKey {
    fn eddsa(key: MonthKey) -> Self {
        Self {
            kid: key.public.kid,
            algorithm: Algorithm::EdDsa,
            key: key.verification,
            lifetime: KeyLifetime::Month(key.month),
        }
    }

    fn hs256(secret: &SecretKey) -> Self {
        Self {
            kid: secret.key_id(),
            algorithm: Algorithm::Hs256,
            key: DecodingKey::from_secret(secret.as_bytes()),
            lifetime: KeyLifetime::Secret,
        }
    }
}

/// The keys of access tokens. Derives those of a month once.
pub(super) struct SigningKeys {
    keyring: Keyring,
    algorithm: Algorithm,
    /// The keys of the last call. `None` before the first one.
    last: Mutex<Option<Arc<KeySet>>>,
}

impl SigningKeys {
    pub(super) fn new(keyring: Keyring, algorithm: Algorithm) -> Self {
        Self { keyring, algorithm, last: Mutex::default() }
    }

    /// Returns the keys at this time.
    pub(super) fn at(&self, now: OffsetDateTime) -> Arc<KeySet> {
        let month = Month::at(now);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(keys) if keys.month == month => keys.clone(),
            _ => {
                let keys = KeySet::derive(&self.keyring, self.algorithm, month);
                last.insert(Arc::new(keys)).clone()
            }
        }
    }

    /// Returns the public keys at this time: of the previous month, this month and the next month,
    /// and then those of the previous secret.
    pub(super) fn published(&self, now: OffsetDateTime) -> Vec<PublicKey> {
        self.at(now).published.clone()
    }

    /// Returns the public keys at this time as a JWK set (RFC 7517, section 5), in JSON.
    pub(super) fn jwk_set(&self, now: OffsetDateTime) -> String {
        self.at(now).jwk_set.clone()
    }
}

fn jwk_set(keys: &[PublicKey]) -> String {
    let keys = keys.iter().map(|PublicKey { kid, x }| {
        json!({
            "kid": kid,
            "kty": PublicKey::KTY,
            "crv": PublicKey::CRV,
            "alg": PublicKey::ALG,
            "use": PublicKey::USE,
            "x": x,
        })
    });
    json!({ "keys": keys.collect::<Vec<_>>() }).to_string()
}

impl fmt::Debug for SigningKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("SigningKeys").finish_non_exhaustive()
    }
}
