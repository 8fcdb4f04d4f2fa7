//! Refresh tokens.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use uuid::Uuid;

use crate::{
    crypto::keys::{Keyring, MAC_BYTES, MacKeys},
    rpc::caller::SessionCaller,
    types::id::{SessionId, UserId},
};

/// Issues and verifies refresh tokens. A refresh token consists of the user ID, the session
/// ID, the generation, and a message authentication code of the three: 256 bits that an
/// attacker can neither guess nor find in the database.
#[derive(Clone, Debug)]
pub struct RefreshTokens(MacKeys);

/// The contents of a refresh token that this service issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefreshToken {
    /// The user and the session that the token belongs to.
    pub caller: SessionCaller,
    /// The number of refresh tokens that the session had before this one.
    pub generation: i32,
}

const ID_BYTES: usize = 16;
const GENERATION_BYTES: usize = 4;

impl RefreshTokens {
    /// Creates an issuer whose keys are derived for refresh tokens only.
    #[must_use]
    pub fn new(keyring: &Keyring) -> Self {
        Self(keyring.derive("refresh tokens"))
    }

    /// Issues the token of a generation. The same input always yields the same token.
    #[must_use]
    pub fn issue(&self, token: RefreshToken) -> String {
        let user_id = token.caller.user_id.as_uuid();
        let session_id = token.caller.session_id.as_uuid();
        let generation = token.generation.to_be_bytes();
        let payload = [&user_id.as_bytes()[..], session_id.as_bytes(), &generation].concat();
        let mac = self.0.sign(&[&payload]);
        URL_SAFE_NO_PAD.encode([&payload[..], &mac].concat())
    }

    /// Verifies a token. Returns `None` if the token was not issued by this service.
    #[must_use]
    pub fn verify(&self, token: &str) -> Option<RefreshToken> {
        let bytes = URL_SAFE_NO_PAD.decode(token).ok()?;
        let (payload, mac) = bytes.split_at_checked(bytes.len().checked_sub(MAC_BYTES)?)?;
        if payload.len() != 2 * ID_BYTES + GENERATION_BYTES || !self.0.verify(&[payload], mac) {
            return None;
        }
        let (user_id, rest) = payload.split_at(ID_BYTES);
        let (session_id, generation) = rest.split_at(ID_BYTES);
        let caller = SessionCaller {
            user_id: UserId::from_uuid(Uuid::from_slice(user_id).ok()?),
            session_id: SessionId::from_uuid(Uuid::from_slice(session_id).ok()?),
        };
        Some(RefreshToken { caller, generation: i32::from_be_bytes(generation.try_into().ok()?) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::crypto::keys::SecretKey;

    fn tokens() -> RefreshTokens {
        let secret = SecretKey::new("k".repeat(32).into()).expect("long enough");
        RefreshTokens::new(&Keyring::new(secret, None))
    }

    fn caller() -> SessionCaller {
        SessionCaller { user_id: UserId::any(), session_id: SessionId::any() }
    }

    proptest! {
        #[test]
        fn issued_refresh_tokens_are_valid(generation: i32) {
            let token = RefreshToken { caller: caller(), generation };
            prop_assert_eq!(tokens().verify(&tokens().issue(token)), Some(token));
        }

        #[test]
        fn a_modified_refresh_token_is_invalid(at: prop::sample::Index, flip in 1u8..) {
            let token = tokens().issue(RefreshToken { caller: caller(), generation: 0 });
            let mut bytes = URL_SAFE_NO_PAD.decode(&token).expect("our own token");
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert_eq!(tokens().verify(&URL_SAFE_NO_PAD.encode(bytes)), None);
        }

        #[test]
        fn garbage_is_not_a_refresh_token(text in "\\PC{0,120}") {
            prop_assert_eq!(tokens().verify(&text), None);
        }
    }
}
