//! The messages of `AuthService`: requests to values, and values to responses.

use http::header::USER_AGENT;
use tonic::Request;

use super::{MAX_USER_AGENT_LEN, Session, authenticator::ActiveToken, store::RevocationScope};
use crate::{
    crypto::{
        month_key::PublicKey,
        password::{CandidatePassword, NewPassword},
    },
    rpc::{
        caller::{Credential, SessionCaller},
        proto::{auth::v1 as pb, to_timestamp},
        validation::{FieldViolations, REQUIRED},
    },
    types::{invalid::InvalidValue, login::LoginIdentifier},
};

/// Returns the `user-agent` of a login, cut to [`MAX_USER_AGENT_LEN`].
pub(super) fn user_agent<T>(request: &Request<T>) -> String {
    let user_agent = request.metadata().as_ref().get(USER_AGENT);
    let user_agent = user_agent.map(|value| String::from_utf8_lossy(value.as_bytes()));
    user_agent.unwrap_or_default().chars().take(MAX_USER_AGENT_LEN).collect()
}

pub(super) fn parse_login(
    request: &pb::LoginRequest,
) -> Result<(LoginIdentifier, CandidatePassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    if request.login.trim().is_empty() {
        violations.add("login", REQUIRED);
    }
    if request.password.is_empty() {
        violations.add("password", REQUIRED);
    }
    violations.finish(|| {
        let login = LoginIdentifier::parse(&request.login);
        Some((login, CandidatePassword::new(&request.password)))
    })
}

pub(super) fn parse_change_password(
    request: &pb::ChangePasswordRequest,
) -> Result<(CandidatePassword, NewPassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    if request.current_password.is_empty() {
        violations.add("current_password", REQUIRED);
    }
    let current = CandidatePassword::new(&request.current_password);
    let new = NewPassword::parse(&request.new_password).and_then(|new| {
        if new.equals(&current) {
            Err(InvalidValue::new("must not be the current password"))
        } else {
            Ok(new)
        }
    });
    let new = violations.check("new_password", new);
    violations.finish(|| Some((current, new?)))
}

pub(super) fn parse_reset_password(
    request: pb::ResetPasswordRequest,
) -> Result<(String, NewPassword), FieldViolations> {
    let mut violations = FieldViolations::default();
    if request.code.is_empty() {
        violations.add("code", REQUIRED);
    }
    let password = violations.check("new_password", NewPassword::parse(&request.new_password));
    violations.finish(|| Some((request.code, password?)))
}

pub(super) fn parse_logout_scope(number: i32) -> Result<RevocationScope, FieldViolations> {
    match pb::LogoutScope::try_from(number) {
        Ok(pb::LogoutScope::Unspecified | pb::LogoutScope::ThisSession) => {
            Ok(RevocationScope::This)
        }
        Ok(pb::LogoutScope::OtherSessions) => Ok(RevocationScope::Others),
        Ok(pb::LogoutScope::AllSessions) => Ok(RevocationScope::All),
        Err(_) => {
            let allowed = InvalidValue::new("must be THIS_SESSION, OTHER_SESSIONS or ALL_SESSIONS");
            Err(FieldViolations::single("scope", allowed))
        }
    }
}

pub(super) fn required(field: &'static str, value: String) -> Result<String, FieldViolations> {
    if value.is_empty() {
        return Err(FieldViolations::single(field, REQUIRED));
    }
    Ok(value)
}

pub(super) fn session_to_proto(session: Session, caller: SessionCaller) -> pb::Session {
    pb::Session {
        id: session.id.to_string(),
        create_time: Some(to_timestamp(session.id.create_time())),
        last_used_time: Some(to_timestamp(session.rotated_at)),
        expire_time: Some(to_timestamp(session.expires_at)),
        user_agent: session.user_agent,
        peer: session.peer,
        current: session.id == caller.session_id,
    }
}

impl From<ActiveToken> for pb::IntrospectTokenResponse {
    fn from(token: ActiveToken) -> Self {
        let response = Self {
            active: true,
            user_id: token.caller.user_id.to_string(),
            expire_time: Some(to_timestamp(token.expires_at)),
            ..Self::default()
        };
        match token.caller.credential {
            Credential::Session(session_id) => Self {
                kind: pb::TokenKind::AccessToken.into(),
                session_id: session_id.to_string(),
                ..response
            },
            Credential::PersonalAccessToken(id) => Self {
                kind: pb::TokenKind::PersonalAccessToken.into(),
                personal_access_token_id: id.to_string(),
                scopes: token.personal_access_token.map(|it| it.scopes.clone()).unwrap_or_default(),
                ..response
            },
        }
    }
}

pub(super) fn signing_key_to_proto(PublicKey { kid, x }: PublicKey) -> pb::SigningKey {
    pb::SigningKey {
        kid,
        kty: PublicKey::KTY.to_owned(),
        crv: PublicKey::CRV.to_owned(),
        alg: PublicKey::ALG.to_owned(),
        r#use: PublicKey::USE.to_owned(),
        x,
    }
}
