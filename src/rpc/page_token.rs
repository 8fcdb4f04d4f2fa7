//! Pages (AIP-158): their size, and the tokens by which a list goes on where the page
//! before ended, by key and not by count.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{
    crypto::keys::{Keyring, MAC_BYTES, MacKeys},
    rpc::validation::FieldViolations,
    types::{id::UserId, invalid::InvalidValue},
};

/// Rows of a page for which no size is given.
pub const DEFAULT_PAGE_SIZE: i32 = 100;

/// Rows of a page at the most: what a caller can be expected to take in at once.
pub const MAX_PAGE_SIZE: i32 = 1_000;

/// Which rows of a list to answer with. `C` names the last row of the page before.
#[derive(Debug)]
pub struct PageRequest<C> {
    /// Rows at the most, from 1 to [`MAX_PAGE_SIZE`].
    pub size: i64,
    /// Rows to leave out first.
    pub skip: i64,
    /// The row after which the page begins; `None` for the first page.
    pub after: Option<C>,
}

/// The fields of a list request that say which page it wants.
#[derive(Debug)]
pub struct PageParams<'a> {
    /// `page_size`
    pub size: i32,
    /// `skip`
    pub skip: i32,
    /// `page_token`
    pub token: &'a str,
}

/// What a page token is bound to: the list's name, whose it is, and what was asked
/// for, in bytes.
#[derive(Debug)]
pub struct PageTokenScope<'a> {
    /// Names the rpc.
    pub list: &'static str,
    /// Whose list it is.
    pub owner_id: UserId,
    /// Filter and order.
    pub query: &'a [u8],
}

/// A place in a list: the sort key of a row.
pub trait Cursor: Sized {
    /// For a page token.
    fn to_bytes(&self) -> Vec<u8>;
    /// From a page token that this service made for the same list.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

/// Makes and reads page tokens: a cursor, authenticated together with its scope.
#[derive(Clone, Debug)]
pub struct PageTokenCodec(MacKeys);

impl PageTokenCodec {
    /// With a key of their own.
    #[must_use]
    pub fn new(keyring: &Keyring) -> Self {
        Self(keyring.derive("page tokens"))
    }

    /// Reads the page that a request asks for.
    pub fn parse<C: Cursor>(
        &self,
        fields: &PageParams<'_>,
        scope: &PageTokenScope<'_>,
        violations: &mut FieldViolations,
    ) -> Option<PageRequest<C>> {
        let size = violations.check("page_size", parse_size(fields.size));
        let skip = violations.check("skip", parse_skip(fields.skip));
        let after = violations.check("page_token", self.decode(fields.token, scope));
        Some(PageRequest { size: size?, skip: skip?, after: after? })
    }

    /// The token of the page that begins after `cursor`.
    #[must_use]
    pub fn encode(&self, cursor: &impl Cursor, scope: &PageTokenScope<'_>) -> String {
        let cursor = cursor.to_bytes();
        let mut token = self.with_scope(&cursor, scope, MacKeys::sign).to_vec();
        token.extend(cursor);
        URL_SAFE_NO_PAD.encode(token)
    }

    fn decode<C: Cursor>(
        &self,
        token: &str,
        scope: &PageTokenScope<'_>,
    ) -> Result<Option<C>, InvalidValue> {
        const ALLOWED: InvalidValue = InvalidValue::new(
            "must be empty or the next_page_token of a call with the same filters and order",
        );

        if token.is_empty() {
            return Ok(None);
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| ALLOWED)?;
        let (mac, cursor) = bytes.split_at_checked(MAC_BYTES).ok_or(ALLOWED)?;
        if !self.with_scope(cursor, scope, |keys, parts| keys.verify(parts, mac)) {
            return Err(ALLOWED);
        }
        C::from_bytes(cursor).map(Some).ok_or(ALLOWED)
    }

    fn with_scope<T>(
        &self,
        cursor: &[u8],
        scope: &PageTokenScope<'_>,
        with: impl FnOnce(&MacKeys, &[&[u8]]) -> T,
    ) -> T {
        let owner_id = scope.owner_id.as_uuid();
        with(&self.0, &[scope.list.as_bytes(), owner_id.as_bytes(), scope.query, cursor])
    }
}

fn parse_size(size: i32) -> Result<i64, InvalidValue> {
    match size {
        ..0 => Err(InvalidValue::new("must not be negative")),
        0 => Ok(DEFAULT_PAGE_SIZE.into()),
        _ => Ok(size.min(MAX_PAGE_SIZE).into()),
    }
}

fn parse_skip(skip: i32) -> Result<i64, InvalidValue> {
    match skip {
        ..0 => Err(InvalidValue::new("must not be negative")),
        _ => Ok(skip.into()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::crypto::keys::SigningKey;

    #[derive(Debug, PartialEq)]
    struct Bytes(Vec<u8>);

    impl Cursor for Bytes {
        fn to_bytes(&self) -> Vec<u8> {
            self.0.clone()
        }
        fn from_bytes(bytes: &[u8]) -> Option<Self> {
            Some(Self(bytes.to_vec()))
        }
    }

    fn tokens() -> PageTokenCodec {
        let key = SigningKey::new("k".repeat(32).into()).expect("long enough");
        PageTokenCodec::new(&Keyring::new(key, None))
    }

    proptest! {
        #[test]
        fn a_token_opens_in_its_scope_only(
            cursor: Vec<u8>, query: Vec<u8>, other: Vec<u8>, at: prop::sample::Index
        ) {
            let (tokens, owner_id) = (tokens(), UserId::generate());
            let scope = PageTokenScope { list: "a", owner_id, query: &query };
            let token = tokens.encode(&Bytes(cursor.clone()), &scope);
            prop_assert_eq!(tokens.decode(&token, &scope), Ok(Some(Bytes(cursor))));

            let other_list = PageTokenScope { list: "b", ..scope };
            prop_assert!(tokens.decode::<Bytes>(&token, &other_list).is_err());
            let other_owner = PageTokenScope { list: "a", owner_id: UserId::generate(), query: &query };
            prop_assert!(tokens.decode::<Bytes>(&token, &other_owner).is_err());
            if other != query {
                let other_query = PageTokenScope { list: "a", owner_id, query: &other };
                prop_assert!(tokens.decode::<Bytes>(&token, &other_query).is_err());
            }

            let scope = PageTokenScope { list: "a", owner_id, query: &query };
            let mut garbled = token.into_bytes();
            let at = at.index(garbled.len());
            garbled[at] = if garbled[at] == b'A' { b'B' } else { b'A' };
            let garbled = String::from_utf8(garbled).expect("still ASCII");
            prop_assert!(tokens.decode::<Bytes>(&garbled, &scope).is_err());
        }

        #[test]
        fn garbage_is_refused(token in "\\PC{1,80}") {
            let scope = PageTokenScope { list: "a", owner_id: UserId::generate(), query: b"" };
            prop_assert!(tokens().decode::<Bytes>(&token, &scope).is_err());
        }
    }

    #[test]
    fn sizes_have_a_default_and_a_ceiling() {
        assert_eq!(parse_size(0), Ok(100));
        assert_eq!(parse_size(1), Ok(1));
        assert_eq!(parse_size(1_000), Ok(1_000));
        assert_eq!(parse_size(i32::MAX), Ok(1_000));
        assert!(parse_size(-1).is_err());
        assert!(parse_skip(i32::MIN).is_err());
        assert_eq!(parse_skip(i32::MAX), Ok(i32::MAX.into()));
    }
}
