//! To-dos: what they are made of, and how they are listed.

use std::collections::BTreeSet;

use time::OffsetDateTime;

use crate::{
    pagination::Cursor,
    types::{
        id::TodoId,
        invalid::InvalidValue,
        text::{self, LineMode},
    },
};

pub mod service;
mod store;

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
    pub state: State,
    /// When it was last changed.
    pub updated_at: OffsetDateTime,
    /// Counts its changes.
    pub version: i64,
}

/// How far a to-do has come; the numbers are the contract's and the database's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
#[expect(missing_docs, reason = "the contract's TodoState documents each")]
pub enum State {
    Draft = 1,
    Todo = 2,
    Doing = 3,
    Done = 4,
    Trash = 5,
}

impl State {
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
    pub state: State,
}

/// What an update changes.
#[derive(Debug)]
pub struct TodoChange {
    /// The new title, if it changes.
    pub title: Option<Title>,
    /// The new description, if it changes.
    pub description: Option<Description>,
    /// The new state, if it changes.
    pub state: Option<State>,
}

/// Which of the owner's to-dos a list holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Filter {
    /// Folded text that the title contains.
    pub title: Option<String>,
    /// Folded text that the description contains.
    pub description: Option<String>,
    /// The numbers of the states, one of which is the to-do's; `None` for all.
    pub states: Option<Vec<i16>>,
}

/// Filters, in characters.
const MAX_FILTER_LENGTH: usize = 100;

impl Filter {
    /// All of them.
    pub const NONE: Self = Self { title: None, description: None, states: None };

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
            numbers.iter().map(|number| State::parse(*number).map(State::number)).collect();
        // Each once, however often the request names it: the database compares every row
        // with all of them.
        let numbers: Vec<_> = states?.into_iter().collect();
        Ok((!numbers.is_empty()).then_some(numbers))
    }

    /// Whether it asks for something of titles and for nothing else.
    #[must_use]
    pub fn is_of_titles_alone(&self) -> bool {
        self.title.is_some() && self.description.is_none() && self.states.is_none()
    }
}

/// What a list is ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderBy {
    /// The time of creation.
    CreateTime(Direction),
    /// The time of the last change.
    UpdateTime(Direction),
    /// The title without its case, then its code points.
    Title(Direction),
}

/// Which end of a list comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The least.
    Rising,
    /// The greatest.
    Falling,
}

impl OrderBy {
    /// Reads `order_by` (AIP-132).
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        use Direction::{Falling, Rising};
        let mut words = raw.split_ascii_whitespace();
        let order = match (words.next(), words.next(), words.next()) {
            (None | Some("create_time"), None, _) => Self::CreateTime(Rising),
            (Some("create_time"), Some("desc"), None) => Self::CreateTime(Falling),
            (Some("update_time"), None, _) => Self::UpdateTime(Rising),
            (Some("update_time"), Some("desc"), None) => Self::UpdateTime(Falling),
            (Some("title"), None, _) => Self::Title(Rising),
            (Some("title"), Some("desc"), None) => Self::Title(Falling),
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
    pub fn cursor(self, todo: &Todo) -> Place {
        let key = match self {
            Self::CreateTime(_) => Key::CreateTime,
            Self::UpdateTime(_) => Key::UpdateTime(todo.updated_at),
            Self::Title(_) => Key::Title(todo.title.clone()),
        };
        Place { id: todo.id, key }
    }
}

/// A place in a list of to-dos: after the to-do with this id and sort key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The to-do's id.
    pub id: TodoId,
    /// What the list is ordered by.
    pub key: Key,
}

/// The sort key of a to-do, besides its id.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named like the orders")]
pub enum Key {
    CreateTime,
    UpdateTime(OffsetDateTime),
    Title(String),
}

/// A byte for the kind of the key, the id, the key.
impl Cursor for Place {
    fn to_bytes(&self) -> Vec<u8> {
        let (kind, key) = match &self.key {
            Key::CreateTime => (0, Vec::new()),
            Key::UpdateTime(time) => (1, time.unix_timestamp_nanos().to_be_bytes().to_vec()),
            Key::Title(title) => (2, title.as_bytes().to_vec()),
        };
        [&[kind], &self.id.as_uuid().as_bytes()[..], &key].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (kind, bytes) = bytes.split_first()?;
        let (id, key) = bytes.split_at_checked(16)?;
        let key = match kind {
            0 => Key::CreateTime,
            1 => {
                let nanoseconds = i128::from_be_bytes(key.try_into().ok()?);
                Key::UpdateTime(OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok()?)
            }
            2 => Key::Title(String::from_utf8(key.to_vec()).ok()?),
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
        use crate::proto::todo::v1::TodoState;
        for (state, number) in [
            (State::Draft, TodoState::Draft),
            (State::Todo, TodoState::Todo),
            (State::Doing, TodoState::Doing),
            (State::Done, TodoState::Done),
            (State::Trash, TodoState::Trash),
        ] {
            assert_eq!(State::parse(number.into()), Ok(state));
        }
        for bad in [0, -1, 6, i32::MAX, 65_537] {
            assert!(State::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn states_to_list_count_once() {
        assert_eq!(Filter::parse_states(&[]), Ok(None));
        assert_eq!(Filter::parse_states(&[4, 1, 4, 4, 1]), Ok(Some(vec![1, 4])));
        assert!(Filter::parse_states(&[4, 0]).is_err());
    }

    #[test]
    fn orders_are_read() {
        use Direction::{Falling, Rising};
        for (raw, order) in [
            ("", OrderBy::CreateTime(Rising)),
            ("create_time", OrderBy::CreateTime(Rising)),
            ("create_time desc", OrderBy::CreateTime(Falling)),
            ("update_time", OrderBy::UpdateTime(Rising)),
            ("  update_time   desc ", OrderBy::UpdateTime(Falling)),
            ("title", OrderBy::Title(Rising)),
            ("title desc", OrderBy::Title(Falling)),
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
        for key in [Key::CreateTime, Key::UpdateTime(clock::now()), Key::Title("Ação 🦀".into())]
        {
            let place = Place { id, key };
            assert_eq!(Place::from_bytes(&place.to_bytes()), Some(place));
        }
        assert_eq!(Place::from_bytes(&[]), None);
        assert_eq!(Place::from_bytes(&[3; 17]), None);
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
            let place = Place { id, key: Key::Title(title) };
            prop_assert_eq!(Place::from_bytes(&place.to_bytes()), Some(place));
        }

        #[test]
        fn any_bytes_are_a_place_or_none(
            kind in 0_u8..4, bytes in prop::collection::vec(any::<u8>(), 14..35)
        ) {
            let bytes = [&[kind], &bytes[..]].concat();
            if let Some(place) = Place::from_bytes(&bytes) {
                let again = Place::from_bytes(&place.to_bytes());
                prop_assert_eq!(again, Some(place));
            }
        }
    }
}
