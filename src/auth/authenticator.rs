//! Authentication of a call by its metadata.

use http::{HeaderMap, header::AUTHORIZATION};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{TOKEN_LEEWAY, sessions::Sessions, token::AccessTokens};
use crate::{
    rpc::{
        caller::{Caller, VerifiedToken},
        error::Error,
    },
    types::clock::Clock,
};

/// Verifies access tokens, and that their sessions are active.
#[derive(Debug)]
pub(crate) struct Authenticator {
    pub(super) access_tokens: AccessTokens,
    pub(super) clock: Clock,
    /// The sessions behind the tokens.
    pub(crate) sessions: Sessions,
}

impl Authenticator {
    /// Verifies the access token in the metadata of a call, but not its session.
    ///
    /// # Errors
    /// [`Error::NotAuthenticated`] if there is none, [`Error::TokenInvalid`] or
    /// [`Error::TokenExpired`].
    pub(crate) fn verify(&self, headers: &HeaderMap) -> Result<VerifiedToken, Error> {
        self.access_tokens.verify(bearer_token(headers)?, self.clock.now())
    }

    /// Returns until when the server accepts a token, by its clock and as monotonic time.
    pub(crate) fn accepted_until(&self, token: &VerifiedToken) -> (OffsetDateTime, Instant) {
        let until = token.expires_at.saturating_add(TOKEN_LEEWAY);
        let time_left = (until - self.clock.now()).try_into().unwrap_or_default();
        (until, Instant::now() + time_left)
    }

    /// Checks that the session of a caller is active.
    ///
    /// # Errors
    /// [`Error::SessionRevoked`].
    pub(crate) async fn check_session(&self, caller: Caller) -> Result<(), Error> {
        let is_active = self.sessions.is_active(caller).await?;
        if is_active { Ok(()) } else { Err(Error::SessionRevoked) }
    }

    /// Verifies an access token and its session.
    ///
    /// # Errors
    /// [`Error::TokenInvalid`], [`Error::TokenExpired`] or [`Error::SessionRevoked`].
    pub(super) async fn verify_access_token(&self, token: &str) -> Result<VerifiedToken, Error> {
        let verified = self.access_tokens.verify(token, self.clock.now())?;
        self.check_session(verified.caller).await?;
        Ok(verified)
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
