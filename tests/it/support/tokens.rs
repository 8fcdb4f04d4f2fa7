//! Handmade access tokens, most of which are invalid.

use std::{collections::BTreeMap, time::SystemTime};

use aws_lc_rs::{
    digest::{SHA256, digest},
    hkdf, hmac,
    signature::{Ed25519KeyPair, KeyPair},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use time::OffsetDateTime;

use super::{Client, app::SECRET_KEY};

/// A key of the service that signs access tokens. It computes what the documentation says, and
/// shares no code with the service.
#[derive(Clone)]
pub enum TokenKey {
    /// A secret.
    Hs256(String),
    /// The key of a secret in a month, `YYYY-MM`.
    EdDsa(String, String),
}

impl TokenKey {
    /// Returns the key that signs the tokens of the servers under test.
    pub fn of_this_month() -> Self {
        Self::of_month(0)
    }

    /// Returns the key of the month that many months after this one.
    pub fn of_month(offset: i32) -> Self {
        Self::EdDsa(SECRET_KEY.to_owned(), month(offset))
    }

    /// Returns the key that signs the tokens of the servers under test with HS256.
    pub fn of_secret() -> Self {
        Self::Hs256(SECRET_KEY.to_owned())
    }

    pub fn algorithm(&self) -> &'static str {
        match self {
            Self::Hs256(_) => "HS256",
            Self::EdDsa(..) => "EdDSA",
        }
    }

    pub fn kid(&self) -> String {
        match self {
            Self::Hs256(secret) => {
                let key = hmac::Key::new(hmac::HMAC_SHA256, &derive(secret, b"fast-zero key id"));
                URL_SAFE_NO_PAD.encode(&hmac::sign(&key, b"").as_ref()[..8])
            }
            Self::EdDsa(..) => {
                let jwk = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{}"}}"#, self.public_key());
                URL_SAFE_NO_PAD.encode(digest(&SHA256, jwk.as_bytes()))
            }
        }
    }

    /// Returns the public key in base64url.
    pub fn public_key(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.key_pair().public_key())
    }

    fn key_pair(&self) -> Ed25519KeyPair {
        let Self::EdDsa(secret, month) = self else { panic!("only EdDSA has public keys") };
        let seed = derive(secret, format!("ed25519{month}").as_bytes());
        Ed25519KeyPair::from_seed_unchecked(&seed).expect("a seed")
    }

    fn sign(&self, payload: &str) -> Vec<u8> {
        match self {
            Self::Hs256(secret) => hmac_of(hmac::HMAC_SHA256, secret.as_bytes(), payload),
            Self::EdDsa(..) => self.key_pair().sign(payload.as_bytes()).as_ref().to_vec(),
        }
    }
}

/// Returns the month that many months after this one, as `YYYY-MM`.
pub fn month(offset: i32) -> String {
    let now = OffsetDateTime::now_utc();
    let number = now.year() * 12 + i32::from(u8::from(now.month())) - 1 + offset;
    format!("{:04}-{:02}", number / 12, number % 12 + 1)
}

fn derive(secret: &str, info: &[u8]) -> [u8; 32] {
    let mut key = [0; 32];
    let pseudorandom = hkdf::Salt::new(hkdf::HKDF_SHA256, &[]).extract(secret.as_bytes());
    let info = [info];
    let output = pseudorandom.expand(&info, hkdf::HKDF_SHA256).expect("a short key");
    output.fill(&mut key).expect("the length of a hash");
    key
}

fn hmac_of(algorithm: hmac::Algorithm, key: &[u8], payload: &str) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(algorithm, key), payload.as_bytes()).as_ref().to_vec()
}

/// A JWT before it is signed. The values of its fields are JSON.
#[derive(Clone)]
pub struct Jwt {
    key: TokenKey,
    header: BTreeMap<&'static str, String>,
    claims: BTreeMap<&'static str, String>,
}

/// Returns the JSON of a text that needs no escapes.
pub fn json_string(text: &str) -> String {
    format!("\"{text}\"")
}

/// Returns the Unix time in this many seconds, as JSON.
pub fn seconds_from_now(seconds: i64) -> String {
    let now = SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    (i64::try_from(now).expect("in range") + seconds).to_string()
}

impl Jwt {
    /// Returns a valid token for a session, with the key of this month.
    pub fn for_session(user_id: &str, session_id: &str) -> Self {
        let header = [("typ", json_string("at+jwt"))];
        let claims = [
            ("iss", json_string("fast-zero")),
            ("aud", json_string("fast-zero")),
            ("sub", json_string(user_id)),
            ("sid", json_string(session_id)),
            ("jti", json_string("01890000-0000-7000-8000-000000000000")),
            ("iat", seconds_from_now(-1)),
            ("exp", seconds_from_now(600)),
        ];
        let key = TokenKey::of_this_month();
        Self { key: key.clone(), header: header.into(), claims: claims.into() }.with_key(key)
    }

    /// Returns a valid token for the session of a client.
    pub fn for_client(client: &Client) -> Self {
        Self::for_session(&client.user_id(), &client.tokens().session_id)
    }

    /// Sets the key that signs, and `alg` and `kid` in the header.
    pub fn with_key(self, key: TokenKey) -> Self {
        let (alg, kid) = (json_string(key.algorithm()), json_string(&key.kid()));
        Self { key, ..self.header("alg", alg).header("kid", kid) }
    }

    /// Sets a field of the header.
    pub fn header(mut self, name: &'static str, json: impl Into<String>) -> Self {
        self.header.insert(name, json.into());
        self
    }

    /// Sets a claim.
    pub fn claim(mut self, name: &'static str, json: impl Into<String>) -> Self {
        self.claims.insert(name, json.into());
        self
    }

    /// Removes a field of the header or a claim.
    pub fn without_field(mut self, name: &str) -> Self {
        let removed = self.header.remove(name).or_else(|| self.claims.remove(name));
        assert!(removed.is_some(), "there was no {name}");
        self
    }

    /// Signs the token as the service does.
    pub fn signed(&self) -> String {
        self.signed_by(|payload| self.key.sign(payload))
    }

    /// Signs the token with another key than its header says.
    pub fn signed_with_key(&self, key: &TokenKey) -> String {
        self.signed_by(|payload| key.sign(payload))
    }

    /// Signs the token with HMAC, whatever its header says.
    pub fn signed_with(&self, algorithm: hmac::Algorithm, key: impl AsRef<[u8]>) -> String {
        self.signed_by(|payload| hmac_of(algorithm, key.as_ref(), payload))
    }

    fn signed_by(&self, sign: impl FnOnce(&str) -> Vec<u8>) -> String {
        let payload = payload(&json(&self.header), &json(&self.claims));
        format!("{payload}.{}", URL_SAFE_NO_PAD.encode(sign(&payload)))
    }

    /// Returns the token with an empty signature.
    pub fn unsigned(&self) -> String {
        format!("{}.", payload(&json(&self.header), &json(&self.claims)))
    }
}

/// Signs two texts as the service signs header and claims.
pub fn sign_parts(key: &TokenKey, header: &str, claims: &str) -> String {
    let payload = payload(header, claims);
    format!("{payload}.{}", URL_SAFE_NO_PAD.encode(key.sign(&payload)))
}

fn payload(header: &str, claims: &str) -> String {
    format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims))
}

fn json(fields: &BTreeMap<&str, String>) -> String {
    let fields: Vec<_> = fields.iter().map(|(name, json)| format!("\"{name}\":{json}")).collect();
    format!("{{{}}}", fields.join(","))
}
