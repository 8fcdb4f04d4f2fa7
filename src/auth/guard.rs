//! Who may call what: nobody without a good access token, except where it says so here.

use std::{collections::HashMap, sync::Arc};

use http::{HeaderMap, header::AUTHORIZATION};
use prost::Message;
use time::OffsetDateTime;

use super::{
    store,
    token::{AccessTokens, Verified},
};
use crate::{
    caller::{Caller, LiveSessions},
    coalesce::Coalescer,
    error::Error,
    proto::DESCRIPTORS,
    types::clock,
};

/// The methods of the contract that need no access token. All others do.
const PUBLIC_METHODS: [&str; 3] = [
    "/fastzero.auth.v1.AuthService/Login",
    "/fastzero.auth.v1.AuthService/RefreshToken",
    "/fastzero.user.v1.UserService/CreateUser",
];

/// Services besides the contract's, which are public and need no database.
const OPEN_SERVICES: [(&str, Access); 3] = [
    ("/grpc.health.v1.Health/", Access::Health),
    ("/grpc.reflection.v1.ServerReflection/", Access::Reflection),
    ("/grpc.reflection.v1alpha.ServerReflection/", Access::Reflection),
];

/// Their methods, for the metrics.
const OPEN_METHODS: [&str; 5] = [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// What a method asks of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing, not even a database.
    Health,
    /// Nothing, either.
    Reflection,
    /// No access token.
    Public,
    /// A good access token.
    Caller,
}

/// All methods of the contract, by their path.
#[derive(Debug)]
pub struct Methods(HashMap<String, Access>);

impl Methods {
    /// Reads them from the descriptors.
    pub fn of_contract() -> Result<Self, Error> {
        let descriptors =
            prost_types::FileDescriptorSet::decode(DESCRIPTORS).map_err(Error::internal)?;
        let mut methods = HashMap::new();
        for file in &descriptors.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let public = PUBLIC_METHODS.contains(&&*path);
                    methods.insert(path, if public { Access::Public } else { Access::Caller });
                }
            }
        }
        Ok(Self(methods))
    }

    /// The paths of all methods there are, those of health and reflection included.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str).chain(OPEN_METHODS)
    }

    /// What a method asks of its caller; `None` if there is no such method.
    #[must_use]
    pub fn access(&self, path: &str) -> Option<Access> {
        let open = || OPEN_SERVICES.iter().find(|(service, _)| path.starts_with(service));
        self.0.get(path).copied().or_else(|| open().map(|(_, access)| *access))
    }
}

/// Finds out who calls.
#[derive(Debug)]
pub struct Authenticator {
    /// To read access tokens.
    pub access_tokens: AccessTokens,
    /// The sessions that were seen alive lately.
    pub live_sessions: Arc<LiveSessions>,
    /// Looks the others up.
    pub find_expiry: Coalescer<store::FindExpiry>,
}

impl Authenticator {
    /// Authenticates a call by its metadata.
    pub async fn authenticate(&self, headers: &HeaderMap) -> Result<Caller, Error> {
        let verified = self.check(bearer_token(headers)?, clock::now()).await?;
        Ok(verified.caller)
    }

    /// Checks an access token and that its session is alive.
    pub async fn check(&self, token: &str, now: OffsetDateTime) -> Result<Verified, Error> {
        let verified = self.access_tokens.verify(token, now)?;
        let caller = verified.caller;
        if self.live_sessions.is_alive(caller, || self.find_expiry.ask(caller)).await? {
            Ok(verified)
        } else {
            Err(Error::SessionRevoked)
        }
    }
}

/// The token of `authorization: Bearer <token>` (RFC 6750, section 2.1).
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
        for good in [&b"Bearer a.b.c"[..], b"bearer a.b.c", b"BEARER  a.b.c "] {
            assert_eq!(token(&[good]).expect("a token"), "a.b.c");
        }
        for none in [&b""[..], b"Bearer", b"Bearer ", b"Basic a.b.c", b"a.b.c", b"Bearera.b.c"] {
            assert!(matches!(token(&[none]), Err(Error::NotAuthenticated)), "{none:?}");
        }
        assert!(matches!(token(&[]), Err(Error::NotAuthenticated)));
    }

    #[test]
    fn what_is_ambiguous_or_not_text_is_invalid() {
        assert!(matches!(token(&[b"Bearer a", b"Bearer a"]), Err(Error::TokenInvalid)));
        assert!(matches!(token(&[b"Bearer \xff"]), Err(Error::TokenInvalid)));
    }

    #[test]
    fn public_methods_exist() {
        let methods = Methods::of_contract().expect("good descriptors");
        for path in PUBLIC_METHODS {
            assert_eq!(methods.access(path), Some(Access::Public), "{path}");
        }
    }

    proptest! {
        #[test]
        fn the_token_is_what_follows_the_scheme(
            scheme in "[Bb][Ee][Aa][Rr][Ee][Rr]", spaces in " {1,3}", end in " {0,3}",
            wanted in "[!-~]([ -~]{0,20}[!-~])?",
        ) {
            let value = format!("{scheme}{spaces}{wanted}{end}");
            let headers = [(AUTHORIZATION, HeaderValue::try_from(value).expect("a header"))];
            let headers = HeaderMap::from_iter(headers);
            prop_assert_eq!(bearer_token(&headers).expect("a token"), wanted);
        }

        #[test]
        fn any_authorization_is_read_or_refused(
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
