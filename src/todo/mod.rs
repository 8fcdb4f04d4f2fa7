//! To-dos: what they are made of, and how they are listed.

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
    named
        .map(|(name, text)| (name.to_owned(), text))
        .into_iter()
        .chain(list::statements())
        .collect()
}

/// Something to do, seen by its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Todo {
    /// Names the to-do for ever.
    pub id: TodoId,
    /// One line.
    pub title: String,
    /// Any number of lines.
    pub description: String,
    /// How far it has come.
    pub state: TodoState,
    /// When it was last changed.
    pub updated_at: OffsetDateTime,
    /// Counts its changes.
    pub version: i64,
}

/// How far a to-do has come; the numbers are the contract's and the database's.
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

    /// Reads a state as a request or the database numbers it.
    pub fn parse(number: i32) -> Result<Self, InvalidValue> {
        let state = Self::ALL.into_iter().find(|state| i32::from(state.number()) == number);
        state.ok_or(InvalidValue::new("must be DRAFT, TODO, DOING, DONE or TRASH"))
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> i16 {
        self as i16
    }
}

/// 1 to 200 characters on one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Title(String);

impl Title {
    /// Reads a title.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        text::parse(raw, LineMode::Single, 1..=200).map(Self)
    }

    /// As kept.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// For searching and ordering.
    #[must_use]
    pub fn folded(&self) -> String {
        text::fold_case(&self.0)
    }
}

/// Up to 10 000 characters on any number of lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description(String);

impl Description {
    /// Reads a description.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        text::parse(raw, LineMode::Multi, 0..=10_000).map(Self)
    }

    /// As kept.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// For searching.
    #[must_use]
    pub fn folded(&self) -> String {
        text::fold_case(&self.0)
    }
}

/// A to-do that is to be added.
#[derive(Debug)]
pub struct NewTodo {
    /// The new to-do's id.
    pub id: TodoId,
    /// Its title.
    pub title: Title,
    /// Its description.
    pub description: Description,
    /// Its state.
    pub state: TodoState,
}

/// What an update changes.
#[derive(Debug)]
pub struct TodoPatch {
    /// The new title, if it changes.
    pub title: Option<Title>,
    /// The new description, if it changes.
    pub description: Option<Description>,
    /// The new state, if it changes.
    pub state: Option<TodoState>,
}

/// Which of the owner's to-dos a list holds.
#[derive(Debug, PartialEq, Eq)]
pub struct TodoFilter {
    /// Folded text that the title contains.
    pub title: Option<String>,
    /// Folded text that the description contains.
    pub description: Option<String>,
    /// The numbers of the states, one of which is the to-do's; `None` for all.
    pub states: Option<Vec<i16>>,
}

/// Filters, in characters.
const MAX_FILTER_LENGTH: usize = 100;

impl TodoFilter {
    /// All of them.
    pub const UNFILTERED: Self = Self { title: None, description: None, states: None };

    /// Reads a text that titles are searched for.
    pub fn parse_title(raw: &str) -> Result<Option<String>, InvalidValue> {
        text::parse_filter(raw, LineMode::Single, MAX_FILTER_LENGTH)
    }

    /// Reads a text that descriptions are searched for.
    pub fn parse_description(raw: &str) -> Result<Option<String>, InvalidValue> {
        text::parse_filter(raw, LineMode::Multi, MAX_FILTER_LENGTH)
    }

    /// Reads the states to list.
    pub fn parse_states(numbers: &[i32]) -> Result<Option<Vec<i16>>, InvalidValue> {
        let states: Result<BTreeSet<_>, _> =
            numbers.iter().map(|number| TodoState::parse(*number).map(TodoState::number)).collect();
        // Each once, however often the request names it: the database compares every row
        // with all of them.
        let numbers: Vec<_> = states?.into_iter().collect();
        Ok((!numbers.is_empty()).then_some(numbers))
    }

    /// Whether it asks for something of titles and for nothing else.
    #[must_use]
    pub fn is_title_only(&self) -> bool {
        self.title.is_some() && self.description.is_none() && self.states.is_none()
    }
}

/// What a list is ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderBy {
    /// The time of creation.
    CreateTime(SortDirection),
    /// The time of the last patch.
    UpdateTime(SortDirection),
    /// The title without its case, then its code points.
    Title(SortDirection),
}

/// Which end of a list comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SortDirection {
    /// The least.
    Ascending,
    /// The greatest.
    Descending,
}

impl OrderBy {
    /// Reads `order_by` (AIP-132).
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

    /// The place of a to-do in a list of this order.
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

/// A place in a list of to-dos: after the to-do with this id and sort key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TodoCursor {
    /// The to-do's id.
    pub id: TodoId,
    /// What the list is ordered by.
    pub key: SortKey,
}

/// The sort key of a to-do, besides its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SortKey {
    CreateTime,
    UpdateTime(OffsetDateTime),
    Title(String),
}

/// A byte for the kind of the key, the id, the key.
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
    use crate::types::clock;

    #[test]
    fn states_have_the_contracts_numbers() {
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
        for bad in [0, -1, 6, i32::MAX, 65_537] {
            assert!(TodoState::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn states_to_list_count_once() {
        assert_eq!(TodoFilter::parse_states(&[]), Ok(None));
        assert_eq!(TodoFilter::parse_states(&[4, 1, 4, 4, 1]), Ok(Some(vec![1, 4])));
        assert!(TodoFilter::parse_states(&[4, 0]).is_err());
    }

    #[test]
    fn orders_are_read() {
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
        for bad in ["desc", "id", "title asc", "title desc desc", "title, create_time", "Title"] {
            assert!(OrderBy::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_place_survives_its_page_token() {
        let id = TodoId::generate();
        for key in [
            SortKey::CreateTime,
            SortKey::UpdateTime(clock::now()),
            SortKey::Title("Ação 🦀".into()),
        ] {
            let place = TodoCursor { id, key };
            assert_eq!(TodoCursor::from_bytes(&place.to_bytes()), Some(place));
        }
        assert_eq!(TodoCursor::from_bytes(&[]), None);
        assert_eq!(TodoCursor::from_bytes(&[3; 17]), None);
    }

    proptest! {
        #[test]
        fn any_order_is_read_or_refused(
            raw in prop_oneof![any::<String>(), "(create_time|update_time|title|desc|,| |\t|\0){0,4}"]
        ) {
            if OrderBy::parse(&raw).is_ok() {
                let words: Vec<_> = raw.split_ascii_whitespace().collect();
                prop_assert!(words.len() <= 2 && words.get(1).is_none_or(|word| *word == "desc"));
            }
        }

        #[test]
        fn any_place_survives_its_page_token(id: u128, title: String) {
            let id = TodoId::from_uuid(uuid::Uuid::from_u128(id));
            let place = TodoCursor { id, key: SortKey::Title(title) };
            prop_assert_eq!(TodoCursor::from_bytes(&place.to_bytes()), Some(place));
        }

        #[test]
        fn any_bytes_are_a_place_or_none(
            kind in 0_u8..4, bytes in prop::collection::vec(any::<u8>(), 14..35)
        ) {
            let bytes = [&[kind], &bytes[..]].concat();
            if let Some(place) = TodoCursor::from_bytes(&bytes) {
                let again = TodoCursor::from_bytes(&place.to_bytes());
                prop_assert_eq!(again, Some(place));
            }
        }
    }
}
