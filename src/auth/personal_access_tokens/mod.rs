//! Personal access tokens: credentials of services and scripts, with scopes and an expiry.
//!
//! A token is found by the IDs in its text. Its row holds the hash of the secret, which a caller
//! presents with each call.

pub(super) mod last_use;
pub(super) mod service;
pub(super) mod text;
pub(super) mod tokens;

use std::sync::atomic::AtomicBool;

use time::{Date, OffsetDateTime};

use crate::{
    crypto::random_secret::SecretHash,
    types::id::{PersonalAccessTokenId, UserId},
};

/// The maximum number of tokens of a user that have not expired.
///
/// Test: `a_user_has_at_most_fifty_tokens_that_have_not_expired`.
pub(super) const MAX_UNEXPIRED_TOKENS: i64 = 50;

/// The maximum number of expired tokens of a user that the creation of another one leaves, so that
/// the list still shows what has expired lately.
///
/// Test: `a_creation_deletes_the_oldest_expired_tokens`.
pub(super) const MAX_EXPIRED_TOKENS: i64 = 50;

/// The longest time until a token expires: a year, and a day for leap years and time zones.
///
/// Test: `all_invalid_fields_of_a_new_token_are_reported`.
const MAX_LIFETIME: time::Duration = time::Duration::days(366);

/// The length of a name, in characters.
///
/// Test: `all_invalid_fields_of_a_new_token_are_reported`.
const NAME_LEN: std::ops::RangeInclusive<usize> = 1..=100;

/// A personal access token of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PersonalAccessToken {
    pub(super) id: PersonalAccessTokenId,
    pub(super) name: String,
    /// Sorted, without repetitions.
    pub(super) scopes: Vec<String>,
    pub(super) expires_at: OffsetDateTime,
    /// In UTC; `None` until the first use.
    pub(super) last_used_date: Option<Date>,
}

/// A token that a user creates.
#[derive(Debug)]
pub(super) struct NewPersonalAccessToken {
    pub(super) id: PersonalAccessTokenId,
    pub(super) user_id: UserId,
    pub(super) now: OffsetDateTime,
    pub(super) details: TokenDetails,
    pub(super) secret_hash: SecretHash,
}

/// What the user says of a new token.
#[derive(Clone, Debug)]
pub(super) struct TokenDetails {
    pub(super) name: String,
    /// Sorted, without repetitions.
    pub(super) scopes: Vec<&'static str>,
    pub(super) expires_at: OffsetDateTime,
}

/// What the verification of a token needs of its row, also if it has expired.
#[derive(Debug)]
pub(crate) struct StoredToken {
    pub(super) user_id: UserId,
    pub(super) id: PersonalAccessTokenId,
    pub(super) secret_hash: SecretHash,
    pub(super) scopes: Vec<String>,
    pub(super) expires_at: OffsetDateTime,
    pub(super) last_used_date: Option<Date>,
    /// Whether this process has started to store the use since the row was read.
    pub(super) is_use_recorded: AtomicBool,
}
