//! Handmade access tokens, most of which are invalid.

use std::{collections::BTreeMap, time::SystemTime};

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use super::{Client, app::SECRET_KEY};

/// A JWT before it is signed. The values of its fields are JSON.
#[derive(Clone)]
pub struct Jwt {
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
    /// Returns a valid token for a session.
    pub fn for_session(user_id: &str, session_id: &str) -> Self {
        let header = [("alg", json_string("HS256")), ("typ", json_string("at+jwt"))];
        let claims = [
            ("iss", json_string("fast-zero")),
            ("aud", json_string("fast-zero")),
            ("sub", json_string(user_id)),
            ("sid", json_string(session_id)),
            ("jti", json_string("01890000-0000-7000-8000-000000000000")),
            ("iat", seconds_from_now(-1)),
            ("exp", seconds_from_now(600)),
        ];
        Self { header: header.into(), claims: claims.into() }
    }

    /// Returns a valid token for the session of a client.
    pub fn for_client(client: &Client) -> Self {
        Self::for_session(&client.user_id(), &client.tokens().session_id)
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
        self.signed_with(hmac::HMAC_SHA256, SECRET_KEY)
    }

    pub fn signed_with(&self, algorithm: hmac::Algorithm, key: &str) -> String {
        signed_with(&json(&self.header), &json(&self.claims), algorithm, key)
    }

    /// Returns the token with an empty signature.
    pub fn unsigned(&self) -> String {
        format!("{}.", payload(&json(&self.header), &json(&self.claims)))
    }
}

/// Signs two texts as the service signs header and claims.
pub fn sign_parts(header: &str, claims: &str) -> String {
    signed_with(header, claims, hmac::HMAC_SHA256, SECRET_KEY)
}

fn signed_with(header: &str, claims: &str, algorithm: hmac::Algorithm, key: &str) -> String {
    let payload = payload(header, claims);
    let tag = hmac::sign(&hmac::Key::new(algorithm, key.as_bytes()), payload.as_bytes());
    format!("{payload}.{}", URL_SAFE_NO_PAD.encode(tag))
}

fn payload(header: &str, claims: &str) -> String {
    format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims))
}

fn json(fields: &BTreeMap<&str, String>) -> String {
    let fields: Vec<_> = fields.iter().map(|(name, json)| format!("\"{name}\":{json}")).collect();
    format!("{{{}}}", fields.join(","))
}
