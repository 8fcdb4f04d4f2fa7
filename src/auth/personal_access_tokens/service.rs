//! Personal access tokens in the messages of `AuthService`.

use time::{Date, OffsetDateTime};

use super::{MAX_LIFETIME, NAME_LEN, PersonalAccessToken, TokenDetails};
use crate::{
    crypto::password::CandidatePassword,
    rpc::{
        policy::scopes,
        proto::{auth::v1 as pb, from_timestamp, to_timestamp},
        validation::{FieldViolations, REQUIRED},
    },
    types::{
        invalid::InvalidValue,
        text::{LineMode, parse},
    },
};

/// Parses a request for a new token, with the current password of the caller.
pub(in crate::auth) fn parse_create(
    request: &pb::CreatePersonalAccessTokenRequest,
    now: OffsetDateTime,
) -> Result<(TokenDetails, CandidatePassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    let name = violations.check("name", parse(&request.name, LineMode::Single, NAME_LEN));
    let scopes = violations.check("scopes", parse_scopes(&request.scopes));
    let expires_at = request.expire_time.map(from_timestamp).ok_or(REQUIRED);
    let expires_at = expires_at.and_then(|time| check_expiry(time, now));
    let expires_at = violations.check("expire_time", expires_at);
    if request.current_password.is_empty() {
        violations.add("current_password", REQUIRED);
    }
    violations.finish(|| {
        let details = TokenDetails { name: name?, scopes: scopes?, expires_at: expires_at? };
        Some((details, CandidatePassword::new(&request.current_password)))
    })
}

/// Returns the scopes in alphabetical order, without repetitions.
fn parse_scopes(requested: &[String]) -> Result<Vec<&'static str>, InvalidValue> {
    let mut known = scopes();
    if requested.is_empty() || requested.iter().any(|scope| !known.contains(&&**scope)) {
        return Err(format!("must be one or more of {}", known.join(", ")).into());
    }
    known.retain(|scope| requested.iter().any(|requested| requested == scope));
    Ok(known)
}

/// `None` is no valid time.
fn check_expiry(
    time: Option<OffsetDateTime>,
    now: OffsetDateTime,
) -> Result<OffsetDateTime, InvalidValue> {
    const ALLOWED: InvalidValue =
        InvalidValue::new("must be in the future, and at most 366 days from now");
    time.filter(|time| *time > now && *time <= now + MAX_LIFETIME).ok_or(ALLOWED)
}

impl From<PersonalAccessToken> for pb::PersonalAccessToken {
    fn from(token: PersonalAccessToken) -> Self {
        Self {
            id: token.id.to_string(),
            name: token.name,
            scopes: token.scopes,
            create_time: Some(to_timestamp(token.id.create_time())),
            expire_time: Some(to_timestamp(token.expires_at)),
            // ISO 8601.
            last_used_date: token.last_used_date.as_ref().map(Date::to_string).unwrap_or_default(),
        }
    }
}
