//! Cursors of changes: a position in the history of an owner, authenticated together with the
//! owner, as clients hold it for up to 30 days.
//!
//! ```text
//! format (1) │ key ID (11) │ full (1) │ version (8) │ made at (8) │ incarnation (16) │ MAC (32)
//! ```

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use uuid::Uuid;

use crate::{
    crypto::keys::{Keyring, MAC_BYTES, MacKeys, SecretKey},
    rpc::{
        error::Error,
        expired_cursor::{ExpiredCursor, MAX_CURSOR_AGE_DAYS},
        validation::FieldViolations,
    },
    types::{id::UserId, invalid::InvalidValue},
};

const DAY_MICROS: i64 = 24 * 60 * 60 * 1_000_000;

/// The version of the format.
const FORMAT: u8 = 1;

/// The length of the ID of a key, in characters.
const KEY_ID_BYTES: usize = 11;

/// The length of what the MAC authenticates besides the owner.
const BODY_BYTES: usize = 1 + KEY_ID_BYTES + 1 + 8 + 8 + 16;

/// A position in the changes of an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChangeCursor {
    /// The client has all changes up to this version.
    pub(super) version: i64,
    /// The history that the version belongs to.
    pub(super) incarnation: Uuid,
    /// The time from which the age counts, in microseconds since 1970.
    pub(super) made_at: i64,
    /// Whether it is within a full sync.
    pub(super) full: bool,
}

/// Encodes and decodes cursors.
#[derive(Clone, Debug)]
pub(crate) struct CursorCodec {
    keys: MacKeys,
    /// The IDs of the keys that verify, the current key first.
    key_ids: Vec<String>,
}

impl CursorCodec {
    /// Creates a codec whose keys are derived for cursors only.
    pub(crate) fn new(keyring: &Keyring) -> Self {
        let key_ids = keyring.verification_keys().map(SecretKey::key_id).collect();
        Self { keys: keyring.derive("change cursors"), key_ids }
    }

    /// Returns the cursor as its owner gets it.
    pub(super) fn encode(&self, cursor: &ChangeCursor, owner_id: UserId) -> String {
        let key_id = self.key_ids.first().map_or("", |id| &**id);
        let mut bytes = Vec::with_capacity(BODY_BYTES + MAC_BYTES);
        bytes.push(FORMAT);
        bytes.extend(key_id.as_bytes());
        bytes.push(cursor.full.into());
        bytes.extend(cursor.version.to_be_bytes());
        bytes.extend(cursor.made_at.to_be_bytes());
        bytes.extend(cursor.incarnation.as_bytes());
        let mac = self.keys.sign(&[owner_id.as_uuid().as_bytes(), &bytes]);
        bytes.extend(mac);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// Decodes the field `cursor` of a request. Returns `None` if it is empty.
    ///
    /// # Errors
    /// [`Error::CursorExpired`] if the cursor is too old, or was made with an unknown key.
    /// [`Error::InvalidRequest`] if it is no cursor of this owner.
    pub(super) fn decode(
        &self,
        text: &str,
        owner_id: UserId,
        now: i64,
    ) -> Result<Option<ChangeCursor>, Error> {
        const ALLOWED: InvalidValue =
            InvalidValue::new("must be empty or the cursor of a response to the same user");

        if text.is_empty() {
            return Ok(None);
        }
        let invalid = || Error::from(FieldViolations::single("cursor", ALLOWED));
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| invalid())?;
        let (body, mac) = bytes.split_at_checked(BODY_BYTES).ok_or_else(invalid)?;
        let (cursor, key_id) = parse_body(body).ok_or_else(invalid)?;
        if mac.len() != MAC_BYTES {
            return Err(invalid());
        }
        if !self.key_ids.iter().any(|known| known.as_bytes() == key_id) {
            return Err(Error::CursorExpired(ExpiredCursor::Key));
        }
        if !self.keys.verify(&[owner_id.as_uuid().as_bytes(), body], mac) {
            return Err(invalid());
        }
        if now.saturating_sub(cursor.made_at) > MAX_CURSOR_AGE_DAYS * DAY_MICROS {
            return Err(Error::CursorExpired(ExpiredCursor::Age));
        }
        Ok(Some(cursor))
    }
}

/// Returns the cursor and the ID of its key.
fn parse_body(body: &[u8]) -> Option<(ChangeCursor, &[u8])> {
    let (&format, rest) = body.split_first()?;
    let (key_id, rest) = rest.split_at_checked(KEY_ID_BYTES)?;
    let (&full, rest) = rest.split_first()?;
    let (version, rest) = rest.split_first_chunk()?;
    let (made_at, incarnation) = rest.split_first_chunk()?;
    let is_key_id = key_id.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte));
    if format != FORMAT || full > 1 || !is_key_id {
        return None;
    }
    let cursor = ChangeCursor {
        version: i64::from_be_bytes(*version),
        incarnation: Uuid::from_slice(incarnation).ok()?,
        made_at: i64::from_be_bytes(*made_at),
        full: full == 1,
    };
    Some((cursor, key_id))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: i64 = 1_800_000_000_000_000;

    fn key(byte: char) -> SecretKey {
        SecretKey::new(byte.to_string().repeat(32).into()).expect("long enough")
    }

    fn codec(current: char, previous: Option<char>) -> CursorCodec {
        CursorCodec::new(&Keyring::new(key(current), previous.map(key)))
    }

    fn cursor() -> ChangeCursor {
        let incarnation = Uuid::from_u128(5);
        ChangeCursor { version: NOW - 9, incarnation, made_at: NOW, full: true }
    }

    fn rejection(decoded: Result<Option<ChangeCursor>, Error>) -> Option<ExpiredCursor> {
        match decoded.expect_err("rejected") {
            Error::CursorExpired(cause) => Some(cause),
            Error::InvalidRequest(_) => None,
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_cursor_expires_after_thirty_days() {
        let (codec, owner_id) = (codec('a', None), UserId::any());
        let text = codec.encode(&cursor(), owner_id);
        let until = NOW + 30 * DAY_MICROS;
        assert!(codec.decode(&text, owner_id, until).is_ok());
        let expired = codec.decode(&text, owner_id, until + 1);
        assert_eq!(rejection(expired), Some(ExpiredCursor::Age));
    }

    #[test]
    fn a_cursor_outlives_one_rotation_of_the_key() {
        let owner_id = UserId::any();
        let text = codec('a', None).encode(&cursor(), owner_id);
        let decoded = codec('b', Some('a')).decode(&text, owner_id, NOW).expect("verified");
        assert_eq!(decoded, Some(cursor()));
        let unknown = codec('c', Some('b')).decode(&text, owner_id, NOW);
        assert_eq!(rejection(unknown), Some(ExpiredCursor::Key));
    }

    #[test]
    fn a_cursor_of_another_owner_is_invalid() {
        let codec = codec('a', None);
        let text = codec.encode(&cursor(), UserId::any());
        assert_eq!(rejection(codec.decode(&text, UserId::any(), NOW)), None);
        assert_eq!(codec.decode("", UserId::any(), NOW).expect("empty"), None);
    }

    proptest! {
        #[test]
        fn a_cursor_is_decoded_as_it_was_encoded(
            version: i64, made_at in 0..NOW, incarnation: u128, full: bool, owner: u128,
            at: proptest::sample::Index
        ) {
            let (codec, owner_id) = (codec('a', None), UserId::from_uuid(Uuid::from_u128(owner)));
            let incarnation = Uuid::from_u128(incarnation);
            let cursor = ChangeCursor { version, incarnation, made_at, full };
            let text = codec.encode(&cursor, owner_id);
            prop_assert_eq!(codec.decode(&text, owner_id, made_at).expect("valid"), Some(cursor));

            let mut garbled = text.into_bytes();
            let at = at.index(garbled.len());
            garbled[at] = if garbled[at] == b'A' { b'B' } else { b'A' };
            let garbled = String::from_utf8(garbled).expect("still ASCII");
            prop_assert!(codec.decode(&garbled, owner_id, made_at).is_err());
        }

        #[test]
        fn garbage_is_invalid(text in "\\PC{1,120}") {
            let decoded = codec('a', None).decode(&text, UserId::any(), NOW);
            prop_assert_eq!(rejection(decoded), None);
        }
    }
}
