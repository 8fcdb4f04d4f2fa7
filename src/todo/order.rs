//! The orders of lists, and the cursors of their pages.

use super::Todo;
use crate::{
    rpc::page_token::Cursor,
    types::{id::TodoId, invalid::InvalidValue},
};

/// The order of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderBy {
    /// The time of creation.
    CreateTime(SortDirection),
    /// The time of the last update.
    UpdateTime(SortDirection),
    /// The case-folded title, then the code points of the title.
    Title(SortDirection),
}

/// The direction of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SortDirection {
    /// The smallest value first.
    Ascending,
    /// The greatest value first.
    Descending,
}

impl OrderBy {
    /// Parses `order_by` (AIP-132).
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        use SortDirection::{Ascending, Descending};
        let mut words = raw.split_ascii_whitespace();
        let order = match (words.next(), words.next(), words.next()) {
            (None | Some("create_time"), None, _) => Self::CreateTime(Ascending),
            (Some("create_time"), Some("desc"), None) => Self::CreateTime(Descending),
            (Some("update_time"), None, _) => Self::UpdateTime(Ascending),
            (Some("update_time"), Some("desc"), None) => Self::UpdateTime(Descending),
            (Some("title"), None, _) => Self::Title(Ascending),
            (Some("title"), Some("desc"), None) => Self::Title(Descending),
            _ => {
                return Err(InvalidValue::new(
                    "must be create_time, update_time or title, alone or followed by desc",
                ));
            }
        };
        Ok(order)
    }

    /// Returns the cursor of a todo in a list of this order.
    #[must_use]
    pub fn cursor(self, todo: &Todo) -> TodoCursor {
        let key = match self {
            Self::CreateTime(_) => SortKey::CreateTime,
            Self::UpdateTime(_) => SortKey::UpdateTime(todo.version),
            Self::Title(_) => SortKey::Title(todo.title.clone()),
        };
        TodoCursor { id: todo.id, key }
    }
}

/// A position in a list of todos: after the todo with this ID and sort key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TodoCursor {
    /// The ID of the todo.
    pub id: TodoId,
    /// The sort key of the todo.
    pub key: SortKey,
}

/// The sort key of a todo, without the ID, which breaks ties of titles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SortKey {
    CreateTime,
    /// The version: the time of the last update in microseconds.
    UpdateTime(i64),
    Title(String),
}

/// Encoded as one byte for the kind of the key, the ID, and the key.
impl Cursor for TodoCursor {
    fn to_bytes(&self) -> Vec<u8> {
        let (kind, key) = match &self.key {
            SortKey::CreateTime => (0, Vec::new()),
            SortKey::UpdateTime(version) => (1, version.to_be_bytes().to_vec()),
            SortKey::Title(title) => (2, title.as_bytes().to_vec()),
        };
        [&[kind], &self.id.as_uuid().as_bytes()[..], &key].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (kind, bytes) = bytes.split_first()?;
        let (id, key) = bytes.split_at_checked(16)?;
        let key = match kind {
            0 => SortKey::CreateTime,
            1 => SortKey::UpdateTime(i64::from_be_bytes(key.try_into().ok()?)),
            2 => SortKey::Title(String::from_utf8(key.to_vec()).ok()?),
            _ => return None,
        };
        Some(Self { id: TodoId::from_uuid(uuid::Uuid::from_slice(id).ok()?), key })
    }
}

/// A position in a list of deleted todos: after the deletion with this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeletedTodoCursor {
    /// The version of the deletion.
    pub version: i64,
}

impl Cursor for DeletedTodoCursor {
    fn to_bytes(&self) -> Vec<u8> {
        self.version.to_be_bytes().to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self { version: i64::from_be_bytes(bytes.try_into().ok()?) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        crypto::keys::{Keyring, SecretKey},
        rpc::{
            page_token::{PageParams, PageTokenCodec, PageTokenScope},
            validation::FieldViolations,
        },
        types::id::UserId,
    };

    #[test]
    fn orders_are_parsed() {
        use SortDirection::{Ascending, Descending};
        for (raw, order) in [
            ("", OrderBy::CreateTime(Ascending)),
            ("create_time", OrderBy::CreateTime(Ascending)),
            ("create_time desc", OrderBy::CreateTime(Descending)),
            ("update_time", OrderBy::UpdateTime(Ascending)),
            ("  update_time   desc ", OrderBy::UpdateTime(Descending)),
            ("title", OrderBy::Title(Ascending)),
            ("title desc", OrderBy::Title(Descending)),
        ] {
            assert_eq!(OrderBy::parse(raw), Ok(order), "{raw}");
        }
        for invalid in ["desc", "id", "title asc", "title desc desc", "title, create_time", "Title"]
        {
            assert!(OrderBy::parse(invalid).is_err(), "{invalid}");
        }
    }

    #[test]
    fn cursors_are_encoded_and_decoded() {
        let id = TodoId::any();
        for key in [
            SortKey::CreateTime,
            SortKey::UpdateTime(1_795_963_120_491_373),
            SortKey::Title("Ação 🦀".into()),
        ] {
            let cursor = TodoCursor { id, key };
            assert_eq!(TodoCursor::from_bytes(&cursor.to_bytes()), Some(cursor));
        }
        assert_eq!(TodoCursor::from_bytes(&[]), None);
        assert_eq!(TodoCursor::from_bytes(&[3; 17]), None);
    }

    /// A cursor of update times in the format of the first release, in nanoseconds.
    struct OldCursor(TodoId);

    impl Cursor for OldCursor {
        fn to_bytes(&self) -> Vec<u8> {
            let nanoseconds = 1_795_963_120_491_373_000_i128.to_be_bytes();
            [&[1], &self.0.as_uuid().as_bytes()[..], &nanoseconds].concat()
        }
        fn from_bytes(_: &[u8]) -> Option<Self> {
            None
        }
    }

    #[test]
    fn a_page_token_of_update_times_of_the_first_release_is_invalid() {
        let key = SecretKey::new("k".repeat(32).into()).expect("long enough");
        let codec = PageTokenCodec::new(&Keyring::new(key, None));
        let scope = PageTokenScope { list: "ListTodos", owner_id: UserId::any(), query: b"" };
        let token = codec.encode(&OldCursor(TodoId::any()), &scope);
        let params = PageParams { size: 0, skip: 0, token: &token };
        let mut violations = FieldViolations::default();
        let page = codec.parse::<TodoCursor>(&params, &scope, &mut violations);
        let rejected = violations.finish(|| page).expect_err("another format");
        assert!(rejected.to_string().contains("page_token"), "{rejected}");
    }

    proptest! {
        #[test]
        fn orders_are_parsed_or_rejected(
            raw in prop_oneof![any::<String>(), "(create_time|update_time|title|desc|,| |\t|\0){0,4}"]
        ) {
            if OrderBy::parse(&raw).is_ok() {
                let words: Vec<_> = raw.split_ascii_whitespace().collect();
                prop_assert!(words.len() <= 2 && words.get(1).is_none_or(|word| *word == "desc"));
            }
        }

        #[test]
        fn title_cursors_are_encoded_and_decoded(id: u128, title: String) {
            let id = TodoId::from_uuid(uuid::Uuid::from_u128(id));
            let cursor = TodoCursor { id, key: SortKey::Title(title) };
            prop_assert_eq!(TodoCursor::from_bytes(&cursor.to_bytes()), Some(cursor));
        }

        #[test]
        fn any_bytes_are_a_cursor_or_none(
            kind in 0_u8..4, bytes in prop::collection::vec(any::<u8>(), 14..35)
        ) {
            let bytes = [&[kind], &bytes[..]].concat();
            if let Some(cursor) = TodoCursor::from_bytes(&bytes) {
                let decoded = TodoCursor::from_bytes(&cursor.to_bytes());
                prop_assert_eq!(decoded, Some(cursor));
            }
        }
    }
}
