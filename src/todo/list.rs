//! Lists of todos: how an order, a filter and a page become SQL.
//!
//! Each order has a row comparison that an index answers (keyset pagination), so that the last
//! page costs what the first one does. [`build`] assembles the statement; each text is built
//! once and prepared once per connection.

use std::sync::LazyLock;

use sqlx::{
    FromRow, PgConnection, Postgres, Row,
    postgres::{PgArguments, PgRow},
    query::Query,
};
use uuid::Uuid;

use super::{
    Todo, TodoFilter,
    order::{OrderBy, SortDirection, SortKey, TodoCursor},
    row::{TODO_COLUMN_COUNT, TodoRow, todo_columns},
};
use crate::{
    database::arguments,
    rpc::{error::Error, page_token::PageRequest},
    types::{id::UserId, text},
};

/// The maximum size of the todos of a page together, in bytes: 1 MiB less the page token and
/// the framing.
///
/// Test: `a_thousand_todos_are_listed_in_pages_below_1_mib_whatever_their_size`.
pub(super) const MAX_PAGE_BYTES: i64 = 1_000_000;

/// The size of a todo besides its texts, in bytes: ID, times, etag, state and the tags of the
/// fields, rounded up.
///
/// Test: `a_thousand_todos_are_listed_in_pages_below_1_mib_whatever_their_size`.
pub(super) const TODO_OVERHEAD_BYTES: i32 = 160;

/// The size of the largest todo, in bytes: 200 and 10,000 characters of four bytes.
///
/// Test: `concurrent_lists_are_batched_and_each_gets_its_own_page`.
const MAX_TODO_BYTES: i64 = 4 * (200 + 10_000) + TODO_OVERHEAD_BYTES as i64;

/// The largest page that never exceeds [`MAX_PAGE_BYTES`]. Its statement measures nothing.
///
/// Test: `concurrent_lists_are_batched_and_each_gets_its_own_page`.
pub(super) const MAX_UNMEASURED_PAGE_SIZE: i64 = MAX_PAGE_BYTES / MAX_TODO_BYTES;

/// A page of todos.
#[derive(Debug)]
pub(super) struct TodoPage {
    pub(super) todos: Vec<Todo>,
    /// Whether more todos follow.
    pub(super) has_more: bool,
}

/// An order as SQL.
#[derive(Clone, Copy)]
struct Order {
    name: &'static str,
    /// The columns of the row comparison. The last one is unique within an owner.
    columns: &'static [&'static str],
    direction: SortDirection,
}

impl From<OrderBy> for Order {
    fn from(order_by: OrderBy) -> Self {
        let (name, columns, direction): (_, &[_], _) = match order_by {
            OrderBy::CreateTime(direction) => ("create_time", &["id"], direction),
            OrderBy::UpdateTime(direction) => ("update_time", &["version"], direction),
            OrderBy::Title(direction) => ("title", &["title_folded", "title", "id"], direction),
        };
        Self { name, columns, direction }
    }
}

impl Order {
    /// Returns the expressions of `order by`.
    fn expressions(self) -> String {
        let suffix = match self.direction {
            SortDirection::Ascending => "",
            SortDirection::Descending => " desc",
        };
        let columns = self.columns.iter().map(|column| format!("{column}{suffix}"));
        columns.collect::<Vec<_>>().join(", ")
    }

    /// Returns the condition that a row comes after the sort key in the parameters from
    /// `parameter` on.
    fn after(self, parameter: usize) -> String {
        let operator = match self.direction {
            SortDirection::Ascending => '>',
            SortDirection::Descending => '<',
        };
        let parameters = (parameter..).take(self.columns.len()).map(|it| format!("${it}"));
        let parameters = parameters.collect::<Vec<_>>().join(", ");
        format!("({}) {operator} ({parameters})", self.columns.join(", "))
    }
}

/// The filters that a statement knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Filters {
    /// None, so that no condition is evaluated for each row.
    None,
    /// A title. A covering index finds the rows (index-only scan), and only those of the page are
    /// read.
    Title,
    /// All of them, of which some may be null.
    All,
}

impl Filters {
    fn of(filter: &TodoFilter) -> Self {
        match filter {
            TodoFilter { title: None, description: None, states: None } => Self::None,
            filter if filter.is_title_only() => Self::Title,
            _ => Self::All,
        }
    }

    /// Returns the parameter with the first column of the sort key. Before it are the
    /// owner, skip, limit, and the filters.
    fn first_key_parameter(self) -> usize {
        match self {
            Self::None => 4,
            Self::Title | Self::All => 7,
        }
    }
}

/// The variants of a statement of one order.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Variant {
    filters: Filters,
    /// Whether the page may exceed the byte budget.
    measured: bool,
}

impl Variant {
    const ALL: [Self; 6] = [
        Self { filters: Filters::None, measured: false },
        Self { filters: Filters::None, measured: true },
        Self { filters: Filters::Title, measured: false },
        Self { filters: Filters::Title, measured: true },
        Self { filters: Filters::All, measured: false },
        Self { filters: Filters::All, measured: true },
    ];

    /// Returns the end of the name of the statement.
    fn suffix(self) -> &'static str {
        match (self.filters, self.measured) {
            (Filters::None, false) => "",
            (Filters::None, true) => "_measured",
            (Filters::Title, false) => "_by_title",
            (Filters::Title, true) => "_by_title_measured",
            (Filters::All, false) => "_filtered",
            (Filters::All, true) => "_filtered_measured",
        }
    }
}

/// The number of parameters of the longest statement: owner, skip, limit, three filters, a sort key
/// by title, and the two of the byte budget.
const PARAMETER_CAPACITY: usize = 11;

/// The statements of all orders and variants.
static STATEMENTS: LazyLock<Vec<(OrderBy, Variant, String)>> = LazyLock::new(|| {
    let directions = [SortDirection::Ascending, SortDirection::Descending];
    let keys = [OrderBy::CreateTime, OrderBy::UpdateTime, OrderBy::Title];
    let orders = keys.into_iter().flat_map(|key| directions.map(key));
    let statements = |order_by: OrderBy| {
        Variant::ALL.map(|variant| (order_by, variant, build(order_by.into(), variant)))
    };
    orders.flat_map(statements).collect()
});

fn statement(order_by: OrderBy, variant: Variant) -> &'static str {
    let mut statements = STATEMENTS.iter();
    let found = statements.find(|(order, of, _)| (*order, *of) == (order_by, variant));
    found.map(|(_, _, text)| &**text).expect("every order has every variant")
}

/// Builds a statement. It reads one row more than the page has, to know whether there is one.
fn build(order: Order, Variant { filters, measured }: Variant) -> String {
    let first_key_parameter = filters.first_key_parameter();
    let (order_by, after) = (order.expressions(), order.after(first_key_parameter));
    let columns = todo_columns!();
    let condition = match filters {
        Filters::None => format!("{after} order by {order_by} offset $2 limit $3"),
        Filters::Title => format!(
            "$5::text is null and $6::smallint[] is null and id = any(array(
                 select id from todos
                 where owner_id = $1 and strpos(title_folded, $4) > 0 and {after}
                 order by {order_by} offset $2 limit $3
             )) order by {order_by}"
        ),
        Filters::All => format!(
            "($4::text is null or strpos(title_folded, $4) > 0)
             and ($5::text is null or strpos(description_folded, $5) > 0)
             and ($6::smallint[] is null or state = any($6))
             and {after}
             order by {order_by} offset $2 limit $3"
        ),
    };
    if !measured {
        return format!("select {columns} from todos where owner_id = $1 and {condition}");
    }
    let budget = first_key_parameter + order.columns.len();
    let overhead = budget + 1;
    format!(
        "select {columns}, candidates
         from (
             select *,
                 count(*) over () as candidates,
                 row_number() over running as position,
                 sum(octet_length(title) + octet_length(description) + ${overhead}::int)
                     over running as bytes
             from (
                 select {columns}, title_folded from todos
                 where owner_id = $1 and {condition}
             ) as page_rows
             window running as (order by {order_by} rows unbounded preceding)
         ) as measured
         where position = 1 or bytes <= ${budget}
         order by position"
    )
}

/// Lists todos.
pub(super) async fn list(
    connection: &mut PgConnection,
    owner_id: UserId,
    filter: &TodoFilter,
    order_by: OrderBy,
    page: &PageRequest<TodoCursor>,
) -> Result<TodoPage, Error> {
    let variant =
        Variant { filters: Filters::of(filter), measured: page.size > MAX_UNMEASURED_PAGE_SIZE };
    let mut query = sqlx::query_with(statement(order_by, variant), arguments(PARAMETER_CAPACITY))
        .bind(owner_id.as_uuid())
        .bind(page.skip)
        .bind(page.size + 1);
    if variant.filters != Filters::None {
        query = query
            .bind(filter.title.as_deref())
            .bind(filter.description.as_deref())
            .bind(filter.states.as_deref());
    }
    query = StartAfter::new(order_by, page.after.as_ref()).bind(order_by, query);
    if variant.measured {
        query = query.bind(MAX_PAGE_BYTES).bind(TODO_OVERHEAD_BYTES);
    }
    let rows = query.fetch_all(connection).await?;
    TodoPage::new(&rows, page.size, variant.measured.then_some(TODO_COLUMN_COUNT))
}

impl TodoPage {
    /// Creates a page of at most `size` todos. `candidates` is the index of the column with the
    /// number of rows before the byte budget, if the statement measures.
    pub(super) fn new(rows: &[PgRow], size: i64, candidates: Option<usize>) -> Result<Self, Error> {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let candidates = match (candidates, rows.first()) {
            (Some(index), Some(row)) => usize::try_from(row.try_get::<i64, _>(index)?),
            _ => Ok(rows.len()),
        };
        let todo = |row| Todo::try_from(TodoRow::from_row(row)?);
        let todos: Vec<_> = rows.iter().take(size).map(todo).collect::<Result<_, Error>>()?;
        let has_more = candidates.is_ok_and(|candidates| candidates > todos.len());
        Ok(Self { todos, has_more })
    }
}

/// The sort key after which a page starts: that of the cursor, or one before all todos.
pub(super) struct StartAfter<'a> {
    pub(super) id: Uuid,
    version: i64,
    title: &'a str,
}

/// Greater than every title, which have at most 200 characters.
static AFTER_ALL_TITLES: LazyLock<String> = LazyLock::new(|| "\u{10ffff}".repeat(201));

impl<'a> StartAfter<'a> {
    pub(super) fn new(order_by: OrderBy, cursor: Option<&'a TodoCursor>) -> Self {
        let mut start = match Order::from(order_by).direction {
            SortDirection::Ascending => Self { id: Uuid::nil(), version: i64::MIN, title: "" },
            SortDirection::Descending => {
                Self { id: Uuid::max(), version: i64::MAX, title: &AFTER_ALL_TITLES }
            }
        };
        if let Some(cursor) = cursor {
            start.id = cursor.id.as_uuid();
            match &cursor.key {
                SortKey::CreateTime => {}
                SortKey::UpdateTime(version) => start.version = *version,
                SortKey::Title(title) => start.title = title,
            }
        }
        start
    }

    /// Binds the columns of the order.
    fn bind(
        self,
        order_by: OrderBy,
        query: Query<'a, Postgres, PgArguments>,
    ) -> Query<'a, Postgres, PgArguments> {
        match order_by {
            OrderBy::CreateTime(_) => query.bind(self.id),
            OrderBy::UpdateTime(_) => query.bind(self.version),
            OrderBy::Title(_) => {
                query.bind(text::fold_case(self.title)).bind(self.title).bind(self.id)
            }
        }
    }
}

/// Returns all statements of this module, with their names.
pub(super) fn statements() -> impl Iterator<Item = (String, &'static str)> {
    STATEMENTS.iter().map(|(order_by, variant, text)| {
        let Order { name, direction, .. } = (*order_by).into();
        let direction = match direction {
            SortDirection::Ascending => "",
            SortDirection::Descending => "_desc",
        };
        (format!("todo_list_{name}{direction}{}", variant.suffix()), &**text)
    })
}
