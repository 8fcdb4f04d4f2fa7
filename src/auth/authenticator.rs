//! Authentication of a call by its metadata.

use std::sync::Arc;

use http::{HeaderMap, header::AUTHORIZATION};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{
    TOKEN_LEEWAY,
    access_token::AccessTokens,
    personal_access_tokens::{StoredToken, text::TokenText, tokens::PersonalAccessTokens},
    sessions::Sessions,
};
use crate::{
    crypto::month_key::PublicKey,
    rpc::{
        caller::{Caller, ClientIp, VerifiedToken},
        error::Error,
        policy::{Access, Method},
    },
    types::clock::Clock,
};

/// Verifies tokens, and that their credentials are active.
#[derive(Debug)]
pub(crate) struct Authenticator {
    pub(super) access_tokens: AccessTokens,
    pub(super) clock: Clock,
    /// The sessions behind the access tokens.
    pub(crate) sessions: Sessions,
    pub(super) personal_access_tokens: PersonalAccessTokens,
}

/// A token whose text is valid. Whether its credential is active is not known yet.
#[derive(Debug)]
pub(crate) enum PresentedToken {
    AccessToken(VerifiedToken),
    PersonalAccessToken(TokenText),
}

/// A token that is valid, and its active credential.
#[derive(Debug)]
pub(crate) struct ActiveToken {
    /// The caller that the token names.
    pub(crate) caller: Caller,
    /// The time when the token expires.
    pub(super) expires_at: OffsetDateTime,
    /// The row of a personal access token.
    pub(super) personal_access_token: Option<Arc<StoredToken>>,
}

impl PresentedToken {
    /// Returns the caller that the token names.
    pub(crate) fn caller(&self) -> Caller {
        match self {
            Self::AccessToken(token) => token.caller.into(),
            Self::PersonalAccessToken(text) => text.caller(),
        }
    }
}

impl ActiveToken {
    /// Checks that the token may call a method: a session may call all, and a personal access token
    /// those of its scopes.
    ///
    /// # Errors
    /// [`Error::ScopeMissing`].
    pub(crate) fn check_access(&self, method: &Method) -> Result<(), Error> {
        let Some(token) = &self.personal_access_token else { return Ok(()) };
        let has_scope = method.scope.is_some_and(|scope| token.scopes.iter().any(|it| it == scope));
        match method.access {
            Access::Public => Ok(()),
            Access::Caller if has_scope => Ok(()),
            Access::Caller | Access::Session => {
                Err(Error::ScopeMissing { required_scope: method.scope })
            }
        }
    }
}

impl Authenticator {
    /// Parses the token in the metadata of a call, and verifies what needs no lookup.
    ///
    /// # Errors
    /// [`Error::NotAuthenticated`] if there is none, [`Error::TokenInvalid`] or
    /// [`Error::TokenExpired`].
    pub(crate) fn parse(&self, headers: &HeaderMap) -> Result<PresentedToken, Error> {
        self.parse_token(bearer_token(headers)?)
    }

    /// Verifies that the credential of a token is active, and records its use.
    ///
    /// # Errors
    /// [`Error::SessionRevoked`], [`Error::TokenInvalid`], [`Error::TokenExpired`], or
    /// [`Error::TooManyAttempts`] instead of `TokenInvalid` after too many of those.
    pub(crate) async fn authenticate(
        &self,
        token: PresentedToken,
        client_ip: ClientIp,
    ) -> Result<ActiveToken, Error> {
        self.verify(token, Some(client_ip)).await
    }

    /// Returns the token, if it is active. The caller of a method introspects it: a service that
    /// gets tokens from others, and must not be over a limit because of theirs.
    pub(super) async fn introspect(&self, token: &str) -> Result<Option<ActiveToken>, Error> {
        let active = match self.parse_token(token) {
            Ok(token) => self.verify(token, None).await,
            Err(error) => Err(error),
        };
        match active {
            Ok(active) => Ok(Some(active)),
            Err(Error::TokenInvalid | Error::TokenExpired { .. } | Error::SessionRevoked) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the public keys that verify access tokens.
    pub(super) fn published_keys(&self) -> Vec<PublicKey> {
        self.access_tokens.published_keys(self.clock.now())
    }

    /// Returns the public keys that verify access tokens as a JWK set, in JSON.
    pub(crate) fn jwk_set(&self) -> String {
        self.access_tokens.jwk_set(self.clock.now())
    }

    /// Returns until when the server accepts a token, by its clock and as monotonic time.
    pub(crate) fn accepted_until(&self, token: &ActiveToken) -> (OffsetDateTime, Instant) {
        let until = match token.personal_access_token {
            Some(_) => token.expires_at,
            None => token.expires_at.saturating_add(TOKEN_LEEWAY),
        };
        let time_left = (until - self.clock.now()).try_into().unwrap_or_default();
        (until, Instant::now() + time_left)
    }

    fn parse_token(&self, token: &str) -> Result<PresentedToken, Error> {
        if TokenText::has_prefix(token) {
            let text = TokenText::parse(token).ok_or(Error::TokenInvalid)?;
            return Ok(PresentedToken::PersonalAccessToken(text));
        }
        let verified = self.access_tokens.verify(token, self.clock.now())?;
        Ok(PresentedToken::AccessToken(verified))
    }

    /// Returns the token, if it is active. `client_ip` is the client that fails if it is not; `None`
    /// if that does not count.
    async fn verify(
        &self,
        token: PresentedToken,
        client_ip: Option<ClientIp>,
    ) -> Result<ActiveToken, Error> {
        let caller = token.caller();
        match token {
            PresentedToken::AccessToken(VerifiedToken { caller: session, expires_at }) => {
                if !self.sessions.is_active(session).await? {
                    return Err(Error::SessionRevoked);
                }
                Ok(ActiveToken { caller, expires_at, personal_access_token: None })
            }
            PresentedToken::PersonalAccessToken(text) => {
                let token = self.personal_access_tokens.verify(&text, client_ip).await?;
                let expires_at = token.expires_at;
                Ok(ActiveToken { caller, expires_at, personal_access_token: Some(token) })
            }
        }
    }
}

/// Returns the token of `authorization: Bearer <token>` (RFC 6750, section 2.1).
fn bearer_token(headers: &HeaderMap) -> Result<&str, Error> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Err(Error::NotAuthenticated);
    };
    if values.next().is_some() {
        return Err(Error::TokenInvalid);
    }
    let value = value.as_bytes().trim_ascii();
    let (scheme, token) = match value.iter().position(|byte| *byte == b' ') {
        Some(space) => value.split_at(space),
        None => (value, &[][..]),
    };
    let token = token.trim_ascii();
    if !scheme.eq_ignore_ascii_case(b"bearer") || token.is_empty() {
        return Err(Error::NotAuthenticated);
    }
    std::str::from_utf8(token).map_err(|_| Error::TokenInvalid)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn token(values: &[&'static [u8]]) -> Result<String, Error> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_bytes(value).expect("a header"));
        }
        bearer_token(&headers).map(str::to_owned)
    }

    #[test]
    fn the_scheme_is_bearer_in_any_case() {
        for valid in [&b"Bearer a.b.c"[..], b"bearer a.b.c", b"BEARER  a.b.c "] {
            assert_eq!(token(&[valid]).expect("a token"), "a.b.c");
        }
        for missing in [&b""[..], b"Bearer", b"Bearer ", b"Basic a.b.c", b"a.b.c", b"Bearera.b.c"] {
            assert!(matches!(token(&[missing]), Err(Error::NotAuthenticated)), "{missing:?}");
        }
        assert!(matches!(token(&[]), Err(Error::NotAuthenticated)));
    }

    #[test]
    fn several_tokens_or_other_bytes_are_invalid() {
        assert!(matches!(token(&[b"Bearer a", b"Bearer a"]), Err(Error::TokenInvalid)));
        assert!(matches!(token(&[b"Bearer \xff"]), Err(Error::TokenInvalid)));
    }

    proptest! {
        #[test]
        fn the_token_follows_the_scheme(
            scheme in "[Bb][Ee][Aa][Rr][Ee][Rr]", spaces in " {1,3}", end in " {0,3}",
            wanted in "[!-~]([ -~]{0,20}[!-~])?",
        ) {
            let value = format!("{scheme}{spaces}{wanted}{end}");
            let headers = [(AUTHORIZATION, HeaderValue::try_from(value).expect("a header"))];
            let headers = HeaderMap::from_iter(headers);
            prop_assert_eq!(bearer_token(&headers).expect("a token"), wanted);
        }

        #[test]
        fn any_authorization_is_parsed_or_rejected(
            values in prop::collection::vec(
                ("([Bb]earer|Basic|)[ \t]{0,2}", prop::collection::vec(0x20_u8..=0xff, 0..40)), 0..3)
        ) {
            let mut headers = HeaderMap::new();
            for (scheme, rest) in &values {
                let bytes = [scheme.as_bytes(), rest].concat();
                // DEL is the only byte from there on that no header has.
                let Ok(value) = HeaderValue::from_bytes(&bytes) else { continue };
                headers.append(AUTHORIZATION, value);
            }
            match bearer_token(&headers) {
                Ok(token) => {
                    prop_assert!(!token.is_empty() && headers.len() == 1);
                    prop_assert_eq!(token.trim_ascii(), token);
                }
                Err(error) => prop_assert!(
                    matches!(error, Error::NotAuthenticated | Error::TokenInvalid), "{error}"
                ),
            }
        }
    }
}
