//! The text of a personal access token.

use secrecy::SecretString;
use uuid::Uuid;

use crate::{
    crypto::{
        checksummed_text::{decode, encode},
        random_secret::{RandomSecret, SECRET_BYTES},
    },
    rpc::caller::{Caller, Credential},
    types::id::{PersonalAccessTokenId, UserId},
};

/// The start of each token, by which secret scanners find it.
const PREFIX: &str = "fz_";

/// What the text of a token contains: the key of its row, and the secret.
#[derive(Clone, Debug)]
pub(crate) struct TokenText {
    pub(crate) user_id: UserId,
    pub(crate) id: PersonalAccessTokenId,
    pub(crate) secret: RandomSecret,
}

impl TokenText {
    /// Returns `true` for a text that is no access token: the header of a JWT is a JSON object, which
    /// never starts with these characters in base64url.
    pub(crate) fn has_prefix(text: &str) -> bool {
        text.starts_with(PREFIX)
    }

    /// Parses a text. Returns `None` if it is malformed or has a wrong checksum.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; 2 * size_of::<Uuid>() + SECRET_BYTES] = decode(PREFIX, text)?;
        let (user_id, rest) = bytes.split_first_chunk()?;
        let (id, secret) = rest.split_first_chunk()?;
        Some(Self {
            user_id: UserId::from_uuid(Uuid::from_bytes(*user_id)),
            id: PersonalAccessTokenId::from_uuid(Uuid::from_bytes(*id)),
            secret: RandomSecret::from_bytes(secret.try_into().ok()?),
        })
    }

    /// Returns the text.
    pub(crate) fn encode(&self) -> SecretString {
        let (user_id, id) = (self.user_id.as_uuid(), self.id.as_uuid());
        encode(PREFIX, &[user_id.as_bytes(), id.as_bytes(), self.secret.as_bytes()])
    }

    /// Returns the caller that the text names, whether or not it is valid.
    pub(crate) fn caller(&self) -> Caller {
        Caller { user_id: self.user_id, credential: Credential::PersonalAccessToken(self.id) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret;

    use super::*;

    fn text(user_id: u128, id: u128, secret: [u8; SECRET_BYTES]) -> TokenText {
        TokenText {
            user_id: UserId::from_uuid(Uuid::from_u128(user_id)),
            id: PersonalAccessTokenId::from_uuid(Uuid::from_u128(id)),
            secret: RandomSecret::from_bytes(secret),
        }
    }

    #[test]
    fn a_text_has_one_format() {
        let text = text(1, 2, [0xff; SECRET_BYTES]).encode();
        let text = text.expose_secret();
        assert_eq!(text.len(), 94);
        assert!(TokenText::has_prefix(text));
        assert!(text.starts_with("fz_AAAAAAAAAAAAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAL_____"), "{text}");
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown = format!("{:?}", text(1, 2, [0xab; SECRET_BYTES]));
        assert!(shown.contains("RandomSecret(…)"), "{shown}");
        assert!(!shown.contains("171") && !shown.contains("abab"), "{shown}");
    }

    proptest! {
        #[test]
        fn an_encoded_token_parses_back(user_id: u128, id: u128, secret: [u8; SECRET_BYTES]) {
            let token = text(user_id, id, secret);
            let parsed = TokenText::parse(token.encode().expose_secret()).expect("our own text");
            prop_assert_eq!((parsed.user_id, parsed.id), (token.user_id, token.id));
            prop_assert_eq!(parsed.secret.as_bytes(), &secret);
        }

        #[test]
        fn any_other_text_is_rejected(text in prop_oneof![
            any::<String>(), "fz_[A-Za-z0-9_-]{91}", "fzr_[A-Za-z0-9_-]{91}", "fz_\\PC{0,100}"
        ]) {
            prop_assert!(TokenText::parse(&text).is_none());
        }
    }
}
