//! Todos: their fields, filters, orders and cursors.

use std::collections::BTreeSet;

use time::OffsetDateTime;

use crate::{
    rpc::page_token::Cursor,
    types::{
        id::TodoId,
        invalid::InvalidValue,
        text::{self, LineMode},
    },
};

mod list;
mod list_batch;
mod row;
pub(crate) mod service;
pub(crate) mod store;

/// Returns the statements on todos by name, for the tests of their plans and the benchmark.
#[doc(hidden)]
#[must_use]
pub fn statements() -> Vec<(String, &'static str)> {
    let named = [
        ("todo_get", store::GET),
        ("todo_get_batch", store::GET_BATCH),
        ("todo_insert", store::INSERT),
        ("todo_update", store::UPDATE),
    ];
    let named = named.into_iter().chain(list_batch::STATEMENTS);
    named.map(|(name, text)| (name.to_owned(), text)).chain(list::statements()).collect()
}

/// A todo as its owner sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Todo {
    /// The ID of the todo, which never changes.
    pub id: TodoId,
    /// The title, a single line.
    pub title: String,
    /// The description, which may have several lines.
    pub description: String,
    /// The workflow state.
    pub state: TodoState,
    /// The time when the todo was last updated.
    pub updated_at: OffsetDateTime,
    /// The number of the current version, which increases with each update.
    pub version: i64,
}

/// The workflow state of a todo. The API and the database use the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub enum TodoState {
    Draft = 1,
    Todo = 2,
    Doing = 3,
    Done = 4,
    Trash = 5,
}

impl TodoState {
    const ALL: [Self; 5] = [Self::Draft, Self::Todo, Self::Doing, Self::Done, Self::Trash];

    /// Parses the number of a state, from a request or from the database.
    pub fn parse(number: i32) -> Result<Self, InvalidValue> {
        let state = Self::ALL.into_iter().find(|state| i32::from(state.number()) == number);
        state.ok_or(InvalidValue::new("must be DRAFT, TODO, DOING, DONE or TRASH"))
    }

    /// Returns the number of the state in the API and in the database.
    #[must_use]
    pub const fn number(self) -> i16 {
        self as i16
    }
}

/// A title: 1 to 200 characters on a single line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Title(String);

impl Title {
    /// Parses a title by the rules of [`text::parse`].
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        text::parse(raw, LineMode::Single, 1..=200).map(Self)
    }

    /// Returns the title as it is stored.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the case-folded title, for searching and ordering.
    #[must_use]
    pub fn folded(&self) -> String {
        text::fold_case(&self.0)
    }
}

/// A description: up to 10,000 characters on any number of lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description(String);

impl Description {
    /// Parses a description by the rules of [`text::parse`].
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        text::parse(raw, LineMode::Multi, 0..=10_000).map(Self)
    }

    /// Returns the description as it is stored.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the case-folded description, for searching.
    #[must_use]
    pub fn folded(&self) -> String {
        text::fold_case(&self.0)
    }
}

/// A todo to be created.
#[derive(Debug)]
pub struct NewTodo {
    /// The ID of the new todo.
    pub id: TodoId,
    /// The title.
    pub title: Title,
    /// The description.
    pub description: Description,
    /// The workflow state.
    pub state: TodoState,
}

/// The fields that an update changes.
#[derive(Debug)]
pub struct TodoPatch {
    /// The new title, or `None` if it does not change.
    pub title: Option<Title>,
    /// The new description, or `None` if it does not change.
    pub description: Option<Description>,
    /// The new state, or `None` if it does not change.
    pub state: Option<TodoState>,
}

/// The filter of a list of todos. A todo matches if it meets all conditions.
#[derive(Debug, PartialEq, Eq)]
pub struct TodoFilter {
    /// The case-folded text that the title contains.
    pub title: Option<String>,
    /// The case-folded text that the description contains.
    pub description: Option<String>,
    /// The numbers of the accepted states; `None` for all states.
    pub states: Option<Vec<i16>>,
}

/// The maximum length of a filter text, in characters.
///
/// Test: `filters_are_not_trimmed_and_have_up_to_100_characters`.
const MAX_FILTER_LENGTH: usize = 100;

impl TodoFilter {
    /// The filter that matches all todos.
    pub const UNFILTERED: Self = Self { title: None, description: None, states: None };

    /// Parses the text to search for in titles.
    pub fn parse_title(raw: &str) -> Result<Option<String>, InvalidValue> {
        text::parse_filter(raw, LineMode::Single, MAX_FILTER_LENGTH)
    }

    /// Parses the text to search for in descriptions.
    pub fn parse_description(raw: &str) -> Result<Option<String>, InvalidValue> {
        text::parse_filter(raw, LineMode::Multi, MAX_FILTER_LENGTH)
    }

    /// Parses the states to list. Returns `None` if there are none, which matches all states.
    pub fn parse_states(numbers: &[i32]) -> Result<Option<Vec<i16>>, InvalidValue> {
        let states: Result<BTreeSet<_>, _> =
            numbers.iter().map(|number| TodoState::parse(*number).map(TodoState::number)).collect();
        // Remove duplicates: the database compares every row with all of these states.
        let numbers: Vec<_> = states?.into_iter().collect();
        Ok((!numbers.is_empty()).then_some(numbers))
    }

    /// Returns `true` if the filter has a condition on the title and no other.
    #[must_use]
    pub fn is_title_only(&self) -> bool {
        self.title.is_some() && self.description.is_none() && self.states.is_none()
    }
}

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
            Self::UpdateTime(_) => SortKey::UpdateTime(todo.updated_at),
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

/// The sort key of a todo, without the ID, which breaks ties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SortKey {
    CreateTime,
    UpdateTime(OffsetDateTime),
    Title(String),
}

/// Encoded as one byte for the kind of the key, the ID, and the key.
impl Cursor for TodoCursor {
    fn to_bytes(&self) -> Vec<u8> {
        let (kind, key) = match &self.key {
            SortKey::CreateTime => (0, Vec::new()),
            SortKey::UpdateTime(time) => (1, time.unix_timestamp_nanos().to_be_bytes().to_vec()),
            SortKey::Title(title) => (2, title.as_bytes().to_vec()),
        };
        [&[kind], &self.id.as_uuid().as_bytes()[..], &key].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (kind, bytes) = bytes.split_first()?;
        let (id, key) = bytes.split_at_checked(16)?;
        let key = match kind {
            0 => SortKey::CreateTime,
            1 => {
                let nanoseconds = i128::from_be_bytes(key.try_into().ok()?);
                SortKey::UpdateTime(OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok()?)
            }
            2 => SortKey::Title(String::from_utf8(key.to_vec()).ok()?),
            _ => return None,
        };
        Some(Self { id: TodoId::from_uuid(uuid::Uuid::from_slice(id).ok()?), key })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::clock::Clock;

    #[test]
    fn states_have_the_numbers_of_the_api() {
        use crate::rpc::proto::todo::v1 as pb;
        for (state, number) in [
            (TodoState::Draft, pb::TodoState::Draft),
            (TodoState::Todo, pb::TodoState::Todo),
            (TodoState::Doing, pb::TodoState::Doing),
            (TodoState::Done, pb::TodoState::Done),
            (TodoState::Trash, pb::TodoState::Trash),
        ] {
            assert_eq!(TodoState::parse(number.into()), Ok(state));
        }
        for invalid in [0, -1, 6, i32::MAX, 65_537] {
            assert!(TodoState::parse(invalid).is_err(), "{invalid}");
        }
    }

    #[test]
    fn duplicate_states_are_removed() {
        assert_eq!(TodoFilter::parse_states(&[]), Ok(None));
        assert_eq!(TodoFilter::parse_states(&[4, 1, 4, 4, 1]), Ok(Some(vec![1, 4])));
        assert!(TodoFilter::parse_states(&[4, 0]).is_err());
    }

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
            SortKey::UpdateTime(Clock::default().now()),
            SortKey::Title("Ação 🦀".into()),
        ] {
            let cursor = TodoCursor { id, key };
            assert_eq!(TodoCursor::from_bytes(&cursor.to_bytes()), Some(cursor));
        }
        assert_eq!(TodoCursor::from_bytes(&[]), None);
        assert_eq!(TodoCursor::from_bytes(&[3; 17]), None);
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
