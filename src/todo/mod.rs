//! Todos: their fields and filters.

use std::collections::BTreeSet;

use crate::types::{
    id::TodoId,
    invalid::InvalidValue,
    text::{self, LineMode},
};

pub(crate) mod changes;
mod list;
mod list_batch;
mod order;
mod row;
pub(crate) mod service;
pub(crate) mod store;
pub(crate) mod sweep;

/// Returns the statements on todos by name, for the tests of their plans and the benchmark.
#[doc(hidden)]
#[must_use]
pub fn statements() -> Vec<(String, &'static str)> {
    let named = [
        ("todo_get", store::GET),
        ("todo_get_batch", store::GET_BATCH),
        ("todo_insert", store::INSERT),
        ("todo_update", store::UPDATE),
        ("todo_update_batch", store::UPDATE_BATCH),
        ("todo_update_group", store::UPDATE_GROUP),
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
    /// The version, by the clock of the owner: the time of the last change in microseconds since
    /// 1970, or more if the owner had another change at that time. It is the etag, the update
    /// time, and the position in the order of all changes of the owner.
    pub version: i64,
}

/// How long the content of a deleted todo is stored, in microseconds: 30 days.
const CONTENT_RETENTION_MICROS: i64 = 30 * DAY_MICROS;

/// How long a deleted todo leaves a tombstone, in microseconds: a day longer, so that the deletion
/// can be read as long as its content could have been.
const TOMBSTONE_RETENTION_MICROS: i64 = 31 * DAY_MICROS;

const DAY_MICROS: i64 = 24 * 60 * 60 * 1_000_000;

/// Returns the version up to which deleted todos are purged at this time, both in microseconds since
/// 1970.
const fn content_cutoff(now: i64) -> i64 {
    now - CONTENT_RETENTION_MICROS
}

/// A deleted todo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletedTodo {
    /// The ID of the todo.
    pub id: TodoId,
    /// The content, or `None` once it is purged.
    pub content: Option<TodoContent>,
    /// The version of the deletion, by the same clock as those of todos: the etag, and the time of
    /// the deletion in microseconds since 1970.
    pub version: i64,
}

/// What a deleted todo still has besides its ID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TodoContent {
    /// The title.
    pub title: String,
    /// The description.
    pub description: String,
    /// The workflow state.
    pub state: TodoState,
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
