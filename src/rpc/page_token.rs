//! Pagination (AIP-158): page sizes, and page tokens for keyset pagination, which contain
//! the sort key of a row and not an offset.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::{
    crypto::keys::{Keyring, MAC_BYTES, MacKeys},
    rpc::validation::FieldViolations,
    types::{id::UserId, invalid::InvalidValue},
};

/// The page size if the request gives none.
pub const DEFAULT_PAGE_SIZE: i32 = 100;

/// The maximum page size, in rows: one response that a client can be expected to process.
///
/// Test: `page_sizes_have_a_default_and_a_maximum`.
pub const MAX_PAGE_SIZE: i32 = 1_000;

/// A validated request for one page. `C` is the cursor of the list.
#[derive(Debug)]
pub struct PageRequest<C> {
    /// The maximum number of rows, from 1 to [`MAX_PAGE_SIZE`].
    pub size: i64,
    /// The number of rows to skip first.
    pub skip: i64,
    /// The row after which the page starts; `None` for the first page.
    pub after: Option<C>,
}

/// The pagination fields of a list request.
#[derive(Debug)]
pub struct PageParams<'a> {
    /// The field `page_size`.
    pub size: i32,
    /// The field `skip`.
    pub skip: i32,
    /// The field `page_token`.
    pub token: &'a str,
}

/// The scope of a page token: the method, the owner, and the query. A token is invalid in
/// any other scope.
#[derive(Debug)]
pub struct PageTokenScope<'a> {
    /// The name of the RPC.
    pub list: &'static str,
    /// The owner of the list.
    pub owner_id: UserId,
    /// The encoded filter and order.
    pub query: &'a [u8],
}

/// A position in a list: the sort key of a row.
pub trait Cursor: Sized {
    /// Encodes the cursor for a page token.
    fn to_bytes(&self) -> Vec<u8>;
    /// Decodes the cursor from a page token that this service issued for the same list.
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

/// Encodes and decodes page tokens: a cursor, authenticated together with its scope.
#[derive(Clone, Debug)]
pub struct PageTokenCodec(MacKeys);

impl PageTokenCodec {
    /// Creates a codec whose keys are derived for page tokens only.
    #[must_use]
    pub fn new(keyring: &Keyring) -> Self {
        Self(keyring.derive("page tokens"))
    }

    /// Parses the pagination fields of a request. Records what is invalid in `violations`.
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

    /// Returns the token of the page that starts after `cursor`.
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

/// Parses the field `page_size`.
pub fn parse_size(size: i32) -> Result<i64, InvalidValue> {
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
    use crate::crypto::keys::SecretKey;

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

    fn codec() -> PageTokenCodec {
        let key = SecretKey::new("k".repeat(32).into()).expect("long enough");
        PageTokenCodec::new(&Keyring::new(key, None))
    }

    proptest! {
        #[test]
        fn a_token_is_valid_in_its_scope_only(
            cursor: Vec<u8>, query: Vec<u8>, other: Vec<u8>, at: prop::sample::Index
        ) {
            let (codec, owner_id) = (codec(), UserId::any());
            let scope = PageTokenScope { list: "a", owner_id, query: &query };
            let token = codec.encode(&Bytes(cursor.clone()), &scope);
            prop_assert_eq!(codec.decode(&token, &scope), Ok(Some(Bytes(cursor))));

            let other_list = PageTokenScope { list: "b", ..scope };
            prop_assert!(codec.decode::<Bytes>(&token, &other_list).is_err());
            let other_owner = PageTokenScope { list: "a", owner_id: UserId::any(), query: &query };
            prop_assert!(codec.decode::<Bytes>(&token, &other_owner).is_err());
            if other != query {
                let other_query = PageTokenScope { list: "a", owner_id, query: &other };
                prop_assert!(codec.decode::<Bytes>(&token, &other_query).is_err());
            }

            let scope = PageTokenScope { list: "a", owner_id, query: &query };
            let mut garbled = token.into_bytes();
            let at = at.index(garbled.len());
            garbled[at] = if garbled[at] == b'A' { b'B' } else { b'A' };
            let garbled = String::from_utf8(garbled).expect("still ASCII");
            prop_assert!(codec.decode::<Bytes>(&garbled, &scope).is_err());
        }

        #[test]
        fn garbage_is_rejected(token in "\\PC{1,80}") {
            let scope = PageTokenScope { list: "a", owner_id: UserId::any(), query: b"" };
            prop_assert!(codec().decode::<Bytes>(&token, &scope).is_err());
        }
    }

    #[test]
    fn page_sizes_have_a_default_and_a_maximum() {
        assert_eq!(parse_size(0), Ok(100));
        assert_eq!(parse_size(1), Ok(1));
        assert_eq!(parse_size(1_000), Ok(1_000));
        assert_eq!(parse_size(i32::MAX), Ok(1_000));
        assert!(parse_size(-1).is_err());
        assert!(parse_skip(i32::MIN).is_err());
        assert_eq!(parse_skip(i32::MAX), Ok(i32::MAX.into()));
    }
}
