//! Access tokens made by hand, to be wrong in one way each.

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

/// JSON of a text that needs no escapes.
pub fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

/// Seconds since 1970, as many before or after now.
pub fn from_now(seconds: i64) -> String {
    let now = SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs();
    (i64::try_from(now).expect("soon") + seconds).to_string()
}

impl Jwt {
    /// A good token for a session.
    pub fn of(user_id: &str, session_id: &str) -> Self {
        let header = [("alg", quoted("HS256")), ("typ", quoted("at+jwt"))];
        let claims = [
            ("iss", quoted("fast-zero")),
            ("aud", quoted("fast-zero")),
            ("sub", quoted(user_id)),
            ("sid", quoted(session_id)),
            ("jti", quoted("01890000-0000-7000-8000-000000000000")),
            ("iat", from_now(-1)),
            ("exp", from_now(600)),
        ];
        Self { header: header.into(), claims: claims.into() }
    }

    /// A good token for the session of a caller.
    pub fn for_session_of(client: &Client) -> Self {
        Self::of(&client.user_id(), &client.tokens().session_id)
    }

    /// With another value in its header.
    pub fn header(mut self, name: &'static str, json: impl Into<String>) -> Self {
        self.header.insert(name, json.into());
        self
    }

    /// With another claim.
    pub fn claim(mut self, name: &'static str, json: impl Into<String>) -> Self {
        self.claims.insert(name, json.into());
        self
    }

    /// Without a field of the header or a claim.
    pub fn without(mut self, name: &str) -> Self {
        let removed = self.header.remove(name).or_else(|| self.claims.remove(name));
        assert!(removed.is_some(), "there was no {name}");
        self
    }

    /// As the service signs it.
    pub fn signed(&self) -> String {
        self.signed_with(hmac::HMAC_SHA256, SECRET_KEY)
    }

    pub fn signed_with(&self, algorithm: hmac::Algorithm, key: &str) -> String {
        signed_with(&json(&self.header), &json(&self.claims), algorithm, key)
    }

    /// With an empty signature.
    pub fn unsigned(&self) -> String {
        format!("{}.", payload(&json(&self.header), &json(&self.claims)))
    }
}

/// Signs any two texts as the service signs header and claims.
pub fn signed(header: &str, claims: &str) -> String {
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
