//! The access tokens that this process has verified, so that a token costs one verification of its
//! signature and not one for each call.
//!
//! Only the hash of a token is stored, and only if the token was valid: an invalid token never
//! evicts one.

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use quick_cache::sync::Cache;
use time::OffsetDateTime;

use super::{TOKEN_LEEWAY, signing_keys::KeyLifetime};
use crate::rpc::caller::VerifiedToken;

/// The verified tokens that are remembered: as many as credentials, most of which are sessions with
/// one token. By calculation, one takes 170 bytes, so all take 6 MiB at most.
///
/// Test: `the_verified_tokens_are_bounded`.
const MAX_VERIFIED_TOKENS: usize = 32_768;

/// The SHA-256 of a token. A different text has a different hash, also if it would decode to the
/// same claims.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct TokenHash([u8; SHA256_OUTPUT_LEN]);

impl TokenHash {
    pub(super) fn new(token: &str) -> Self {
        let mut hash = [0; SHA256_OUTPUT_LEN];
        hash.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        Self(hash)
    }
}

/// A token whose signature and claims are valid, until it expires or its key retires.
#[derive(Clone, Copy, Debug)]
pub(super) struct ValidToken {
    pub(super) token: VerifiedToken,
    pub(super) key: KeyLifetime,
}

impl ValidToken {
    /// Returns `true` if the token has not expired, and its key still verifies.
    pub(super) fn is_valid_at(&self, now: OffsetDateTime) -> bool {
        now < self.token.expires_at.saturating_add(TOKEN_LEEWAY) && self.key.contains(now)
    }
}

/// The cache of verified tokens.
pub(super) struct VerifiedTokens(Cache<TokenHash, ValidToken>);

impl VerifiedTokens {
    pub(super) fn new() -> Self {
        Self(Cache::new(MAX_VERIFIED_TOKENS))
    }

    /// Returns a token that was verified before and is valid now.
    pub(super) fn get(&self, hash: &TokenHash, now: OffsetDateTime) -> Option<VerifiedToken> {
        let valid = self.0.get(hash)?;
        if !valid.is_valid_at(now) {
            self.0.remove(hash);
            return None;
        }
        Some(valid.token)
    }

    /// Remembers a token that is valid.
    pub(super) fn insert(&self, hash: TokenHash, valid: ValidToken) {
        self.0.insert(hash, valid);
    }

    /// Returns the number of remembered tokens.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use time::{Duration, macros::datetime};

    use super::*;
    use crate::{
        rpc::caller::SessionCaller,
        types::id::{SessionId, UserId},
    };

    const NOW: OffsetDateTime = datetime!(2026-12-15 12:00 UTC);

    fn valid_token() -> ValidToken {
        let caller = SessionCaller { user_id: UserId::any(), session_id: SessionId::any() };
        let token = VerifiedToken { caller, expires_at: NOW + Duration::HOUR };
        ValidToken { token, key: KeyLifetime::Secret }
    }

    #[test]
    fn the_verified_tokens_are_bounded() {
        let verified = VerifiedTokens::new();
        for number in 0..2 * MAX_VERIFIED_TOKENS {
            verified.insert(TokenHash::new(&number.to_string()), valid_token());
        }
        assert!(verified.len() <= 32_768, "{}", verified.len());
    }

    #[test]
    fn an_expired_token_is_forgotten() {
        let (verified, hash) = (VerifiedTokens::new(), TokenHash::new("a"));
        verified.insert(hash, valid_token());
        assert!(verified.get(&TokenHash::new("b"), NOW).is_none());
        assert!(verified.get(&hash, NOW).is_some());
        assert!(verified.get(&hash, NOW + Duration::hours(2)).is_none());
        assert_eq!(verified.len(), 0);
    }
}
