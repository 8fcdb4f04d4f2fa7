//! The statements on to-dos. The owner stands in every one, so that another owner's
//! to-do cannot be found.

use std::sync::LazyLock;

use sqlx::{PgConnection, PgExecutor};
use time::{OffsetDateTime, macros::datetime};
use uuid::Uuid;

use super::{Direction, Filter, Key, NewTodo, OrderBy, Place, State, Todo, TodoChange};
use crate::{
    coalesce::{Statement, in_order},
    database::is_foreign_key_violation,
    error::Error,
    etag::{FIRST_VERSION, Guard},
    pagination::Page,
    types::{
        id::{TodoId, UserId},
        text,
    },
};

/// What the to-dos of a page may add up to, in bytes: 1 MiB less room for the page
/// token and the framing.
const MAX_PAGE_BYTES: i64 = 1_000_000;

/// What a to-do takes in an answer besides its texts, in bytes: id, times, etag, state
/// and tags, rounded up.
const TODO_OVERHEAD_BYTES: i32 = 160;

struct Row {
    id: Uuid,
    title: String,
    description: String,
    state: i16,
    updated_at: OffsetDateTime,
    version: i64,
}

impl TryFrom<Row> for Todo {
    type Error = Error;

    fn try_from(row: Row) -> Result<Self, Error> {
        let state = State::parse(row.state.into())
            .map_err(|_| Error::internal(format!("a to-do has the unknown state {}", row.state)))?;
        Ok(Self {
            id: TodoId::from_uuid(row.id),
            title: row.title,
            description: row.description,
            state,
            updated_at: row.updated_at,
            version: row.version,
        })
    }
}

/// Adds to-dos, each to its owner's. [`Error::SessionRevoked`] when the owner has been
/// deleted meanwhile.
#[derive(Debug)]
pub struct Insert;

impl Statement for Insert {
    type Question = (UserId, NewTodo);
    type Answer = Todo;

    async fn one(
        connection: &mut PgConnection,
        (owner_id, todo): &(UserId, NewTodo),
    ) -> Result<Todo, Error> {
        insert(connection, *owner_id, todo).await?;
        Ok(todo.into())
    }

    async fn many(
        connection: &mut PgConnection,
        questions: &[(UserId, NewTodo)],
    ) -> Result<Vec<Option<Todo>>, Error> {
        let added = insert_all(connection, questions).await?;
        let is_added = |todo: &NewTodo| added.contains(&todo.id.as_uuid());
        Ok(questions.iter().map(|(_, todo)| is_added(todo).then(|| todo.into())).collect())
    }
}

async fn insert(
    executor: impl PgExecutor<'_>,
    owner_id: UserId,
    todo: &NewTodo,
) -> Result<(), Error> {
    let inserted = sqlx::query!(
        "insert into todos (
             owner_id, id, title, title_folded, description, description_folded,
             state, updated_at, version
         ) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        owner_id.as_uuid(),
        todo.id.as_uuid(),
        todo.title.as_str(),
        todo.title.folded(),
        todo.description.as_str(),
        todo.description.folded(),
        todo.state.number(),
        todo.id.create_time(),
        FIRST_VERSION,
    );
    inserted.execute(executor).await.map(drop).map_err(no_owner)
}

/// Adds the to-dos whose owners are there, and not about to be deleted. Their ids.
async fn insert_all(
    executor: impl PgExecutor<'_>,
    todos: &[(UserId, NewTodo)],
) -> Result<Vec<Uuid>, Error> {
    fn column<'a, T>(todos: &'a [(UserId, NewTodo)], of: impl Fn(&'a NewTodo) -> T) -> Vec<T> {
        todos.iter().map(|(_, todo)| of(todo)).collect()
    }
    let owner_ids: Vec<_> = todos.iter().map(|(owner_id, _)| owner_id.as_uuid()).collect();
    let added = sqlx::query_scalar!(
        "with owners as materialized (
             select id from users where id = any($1::uuid[]) for key share skip locked
         )
         insert into todos (
             owner_id, id, title, title_folded, description, description_folded,
             state, updated_at, version
         )
         select new.*, $9::bigint
         from unnest(
             $1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[],
             $7::smallint[], $8::timestamptz[]
         ) as new (owner_id)
         join owners on owners.id = new.owner_id
         returning todos.id",
        &owner_ids,
        &column(todos, |todo| todo.id.as_uuid()),
        &column(todos, |todo| todo.title.as_str()) as &[&str],
        &column(todos, |todo| todo.title.folded()),
        &column(todos, |todo| todo.description.as_str()) as &[&str],
        &column(todos, |todo| todo.description.folded()),
        &column(todos, |todo| todo.state.number()),
        &column(todos, |todo| todo.id.create_time()),
        FIRST_VERSION,
    );
    Ok(added.fetch_all(executor).await?)
}

fn no_owner(error: sqlx::Error) -> Error {
    if is_foreign_key_violation(&error, "todos_owner_id_fkey") {
        return Error::SessionRevoked;
    }
    error.into()
}

/// What is there once it is added.
impl From<&NewTodo> for Todo {
    fn from(todo: &NewTodo) -> Self {
        Self {
            id: todo.id,
            title: todo.title.as_str().to_owned(),
            description: todo.description.as_str().to_owned(),
            state: todo.state,
            updated_at: todo.id.create_time(),
            version: FIRST_VERSION,
        }
    }
}

/// Looks up a to-do.
pub(super) async fn find(
    executor: impl PgExecutor<'_>,
    owner_id: UserId,
    id: TodoId,
) -> Result<Option<Todo>, Error> {
    let row = sqlx::query_as!(
        Row,
        "select id, title, description, state, updated_at, version
         from todos where owner_id = $1 and id = $2",
        owner_id.as_uuid(),
        id.as_uuid(),
    )
    .fetch_optional(executor)
    .await?;
    row.map(Todo::try_from).transpose()
}

/// Looks up to-dos, each of its owner.
#[derive(Debug)]
pub struct Find;

impl Statement for Find {
    type Question = (UserId, TodoId);
    type Answer = Option<Todo>;

    async fn one(
        connection: &mut PgConnection,
        &(owner_id, id): &(UserId, TodoId),
    ) -> Result<Option<Todo>, Error> {
        find(connection, owner_id, id).await
    }

    async fn many(
        connection: &mut PgConnection,
        questions: &[(UserId, TodoId)],
    ) -> Result<Vec<Option<Option<Todo>>>, Error> {
        let (owner_ids, ids): (Vec<_>, Vec<_>) =
            questions.iter().map(|(owner_id, id)| (owner_id.as_uuid(), id.as_uuid())).unzip();
        let rows = sqlx::query!(
            r#"select question as "question!", todos.id, title, description, state, updated_at,
                   version
               from unnest($1::uuid[], $2::uuid[]) with ordinality
                   as questions (owner_id, id, question)
               join todos using (owner_id, id)"#,
            &owner_ids,
            &ids,
        )
        .fetch_all(connection)
        .await?;
        let found = rows.into_iter().map(|row| {
            let (id, title, description) = (row.id, row.title, row.description);
            let (state, updated_at, version) = (row.state, row.updated_at, row.version);
            let todo = Row { id, title, description, state, updated_at, version };
            (row.question, todo.try_into())
        });
        Ok(in_order(questions.len(), found))
    }
}

/// Changes a to-do. `None` if there is none, or none of the guarded version.
pub(super) async fn update(
    executor: impl PgExecutor<'_>,
    owner_id: UserId,
    id: TodoId,
    guard: Guard,
    change: &TodoChange,
    now: OffsetDateTime,
) -> Result<Option<Todo>, Error> {
    let (title, description) = (change.title.as_ref(), change.description.as_ref());
    let row = sqlx::query_as!(
        Row,
        "update todos set
             title = coalesce($4, title),
             title_folded = coalesce($5, title_folded),
             description = coalesce($6, description),
             description_folded = coalesce($7, description_folded),
             state = coalesce($8, state),
             updated_at = $9,
             version = version + 1
         where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)
         returning id, title, description, state, updated_at, version",
        owner_id.as_uuid(),
        id.as_uuid(),
        guard.version(),
        title.map(super::Title::as_str),
        title.map(super::Title::folded),
        description.map(super::Description::as_str),
        description.map(super::Description::folded),
        change.state.map(State::number),
        now,
    )
    .fetch_optional(executor)
    .await?;
    row.map(Todo::try_from).transpose()
}

/// Deletes a to-do. Whether there was one, of the guarded version.
pub(super) async fn delete(
    executor: impl PgExecutor<'_>,
    owner_id: UserId,
    id: TodoId,
    guard: Guard,
) -> Result<bool, Error> {
    let deleted = sqlx::query!(
        "delete from todos
         where owner_id = $1 and id = $2 and ($3::bigint is null or version = $3)",
        owner_id.as_uuid(),
        id.as_uuid(),
        guard.version(),
    )
    .execute(executor)
    .await?;
    Ok(deleted.rows_affected() > 0)
}

/// A page of to-dos.
#[derive(Debug)]
pub struct Listed {
    pub(super) todos: Vec<Todo>,
    /// Whether the list goes on after them.
    pub(super) more: bool,
}

struct PageRow {
    id: Uuid,
    title: String,
    description: String,
    state: i16,
    updated_at: OffsetDateTime,
    version: i64,
    candidates: i64,
}

/// The statement that lists to-dos in one order. It reads one row more than the page
/// holds, to know whether there is one, and then drops the rows that would make the
/// answer too large, all but the first.
///
/// `found` finds the rows; all use the same parameters.
macro_rules! page {
    ([$($found:literal),+], $order:literal, [$executor:ident, $owner:ident, $filter:ident, $page:ident], $($key:expr),+) => {
        sqlx::query_as!(
            PageRow,
            r#"select id, title, description, state, updated_at, version, candidates as "candidates!"
               from (
                   select *,
                       count(*) over () as candidates,
                       row_number() over so_far as position,
                       sum(octet_length(title) + octet_length(description) + $8::int) over so_far as bytes
                   from (
                       select id, title, title_folded, description, state, updated_at, version
                       from todos
                       where owner_id = $1 and "# $(+ $found)+ + r#"
                   ) as found
                   window so_far as (order by "# + $order + r#" rows unbounded preceding)
               ) as measured
               where position = 1 or bytes <= $7
               order by position"#,
            $owner.as_uuid(),
            $filter.title.as_deref(),
            $filter.description.as_deref(),
            $filter.states.as_deref(),
            $page.skip,
            $page.size + 1,
            MAX_PAGE_BYTES,
            TODO_OVERHEAD_BYTES,
            $($key),+
        )
        .fetch_all($executor)
        .await?
    };
}

/// Each order has a statement of its own, whose comparison with the place before the
/// page is one that an index answers: the last page costs what the first one does. Where
/// only titles are searched, another one asks that index alone, which holds them, before it
/// reads the rows of the page.
macro_rules! list {
    ($after:literal, $order:literal, [$executor:ident, $owner:ident, $filter:ident, $page:ident], $($key:expr),+) => {
        if $filter.is_of_titles_alone() {
            page!(
                [
                    "$3::text is null and $4::smallint[] is null
                     and id = any(array(
                         select id from todos
                         where owner_id = $1 and strpos(title_folded, $2) > 0 and ", $after, "
                         order by ", $order, "
                         offset $5 limit $6
                     ))"
                ],
                $order,
                [$executor, $owner, $filter, $page],
                $($key),+
            )
        } else {
            page!(
                [
                    "($2::text is null or strpos(title_folded, $2) > 0)
                     and ($3::text is null or strpos(description_folded, $3) > 0)
                     and ($4::smallint[] is null or state = any($4))
                     and ", $after, "
                     order by ", $order, "
                     offset $5 limit $6"
                ],
                $order,
                [$executor, $owner, $filter, $page],
                $($key),+
            )
        }
    };
}

/// Lists to-dos.
pub(super) async fn list(
    executor: impl PgExecutor<'_>,
    owner_id: UserId,
    filter: &Filter,
    order_by: OrderBy,
    page: &Page<Place>,
) -> Result<Listed, Error> {
    use Direction::{Falling, Rising};
    let begin = Begin::of(order_by, page.after.as_ref());
    let Begin { id, time, title } = &begin;
    let folded = text::fold_case(title);
    let rows = match order_by {
        OrderBy::CreateTime(Rising) => {
            list!("id > $9", "id", [executor, owner_id, filter, page], id)
        }
        OrderBy::CreateTime(Falling) => {
            list!("id < $9", "id desc", [executor, owner_id, filter, page], id)
        }
        OrderBy::UpdateTime(Rising) => list!(
            "(updated_at, id) > ($9, $10)",
            "updated_at, id",
            [executor, owner_id, filter, page],
            time,
            id
        ),
        OrderBy::UpdateTime(Falling) => list!(
            "(updated_at, id) < ($9, $10)",
            "updated_at desc, id desc",
            [executor, owner_id, filter, page],
            time,
            id
        ),
        OrderBy::Title(Rising) => list!(
            "(title_folded, title, id) > ($9, $10, $11)",
            "title_folded, title, id",
            [executor, owner_id, filter, page],
            &folded,
            title,
            id
        ),
        OrderBy::Title(Falling) => list!(
            "(title_folded, title, id) < ($9, $10, $11)",
            "title_folded desc, title desc, id desc",
            [executor, owner_id, filter, page],
            &folded,
            title,
            id
        ),
    };
    listed(rows, page.size)
}

/// Lists to-dos as most callers do, each of its owner's: by their creation, all of them, and
/// not many at once. None takes much longer than the others, which wait for it.
#[derive(Debug)]
pub struct ListPlain;

/// A page of such a list.
#[derive(Debug)]
pub struct PlainPage {
    owner_id: UserId,
    page: Page<Place>,
}

/// To-dos of such a page.
const MAX_PLAIN_SIZE: i64 = 100;

impl PlainPage {
    const ORDER: OrderBy = OrderBy::CreateTime(Direction::Rising);

    /// The page itself where it is none of such a list.
    pub(super) fn of(
        owner_id: UserId,
        filter: &Filter,
        order_by: OrderBy,
        page: Page<Place>,
    ) -> Result<Self, Page<Place>> {
        let is_plain = *filter == Filter::NONE
            && order_by == Self::ORDER
            && page.skip == 0
            && page.size <= MAX_PLAIN_SIZE;
        if is_plain { Ok(Self { owner_id, page }) } else { Err(page) }
    }

    fn begin(&self) -> Uuid {
        Begin::of(Self::ORDER, self.page.after.as_ref()).id
    }
}

impl Statement for ListPlain {
    type Question = PlainPage;
    type Answer = Listed;

    async fn one(
        connection: &mut PgConnection,
        PlainPage { owner_id, page }: &PlainPage,
    ) -> Result<Listed, Error> {
        list(connection, *owner_id, &Filter::NONE, PlainPage::ORDER, page).await
    }

    async fn many(
        connection: &mut PgConnection,
        questions: &[PlainPage],
    ) -> Result<Vec<Option<Listed>>, Error> {
        let owner_ids: Vec<_> = questions.iter().map(|it| it.owner_id.as_uuid()).collect();
        let after: Vec<_> = questions.iter().map(PlainPage::begin).collect();
        let limits: Vec<_> = questions.iter().map(|it| it.page.size + 1).collect();
        let rows = sqlx::query!(
            r#"select question as "question!", page.id, title, description, state, updated_at,
                   version, candidates as "candidates!"
               from unnest($1::uuid[], $2::uuid[], $3::bigint[]) with ordinality
                   as questions (owner_id, begin, size, question)
               cross join lateral (
                   select *,
                       count(*) over () as candidates,
                       row_number() over so_far as position,
                       sum(octet_length(title) + octet_length(description) + $5::int) over so_far as bytes
                   from (
                       select id, title, description, state, updated_at, version
                       from todos
                       where owner_id = questions.owner_id and id > questions.begin
                       order by id
                       limit questions.size
                   ) as found
                   window so_far as (order by id rows unbounded preceding)
               ) as page
               where position = 1 or bytes <= $4"#,
            &owner_ids,
            &after,
            &limits,
            MAX_PAGE_BYTES,
            TODO_OVERHEAD_BYTES,
        )
        .fetch_all(connection)
        .await?;
        let mut pages: Vec<_> = questions.iter().map(|_| Vec::new()).collect();
        for row in rows {
            let page = usize::try_from(row.question - 1).ok().and_then(|at| pages.get_mut(at));
            let page = page.ok_or_else(|| Error::internal("a row of no page"))?;
            let (id, title, description) = (row.id, row.title, row.description);
            let (state, updated_at, version) = (row.state, row.updated_at, row.version);
            let candidates = row.candidates;
            page.push(PageRow { id, title, description, state, updated_at, version, candidates });
        }
        let pages = pages.into_iter().zip(questions).map(|(mut rows, question)| {
            // In no order that the database promises.
            rows.sort_unstable_by_key(|row: &PageRow| row.id);
            listed(rows, question.page.size).ok()
        });
        Ok(pages.collect())
    }
}

fn listed(mut rows: Vec<PageRow>, size: i64) -> Result<Listed, Error> {
    let candidates = rows.first().map_or(0, |row| row.candidates);
    rows.truncate(usize::try_from(size).unwrap_or(usize::MAX));
    let more = usize::try_from(candidates).is_ok_and(|candidates| candidates > rows.len());
    let todo = |row: PageRow| {
        let PageRow { id, title, description, state, updated_at, version, .. } = row;
        Todo::try_from(Row { id, title, description, state, updated_at, version })
    };
    Ok(Listed { todos: rows.into_iter().map(todo).collect::<Result<_, _>>()?, more })
}

/// Where a page begins: after this key, or one before all to-dos of the order.
struct Begin {
    id: Uuid,
    time: OffsetDateTime,
    title: String,
}

/// Greater than every title, which have 200 characters at the most.
static AFTER_ALL_TITLES: LazyLock<String> = LazyLock::new(|| "\u{10ffff}".repeat(201));

impl Begin {
    fn of(order_by: OrderBy, after: Option<&Place>) -> Self {
        let (OrderBy::CreateTime(direction)
        | OrderBy::UpdateTime(direction)
        | OrderBy::Title(direction)) = order_by;
        let mut begin = match direction {
            Direction::Rising => {
                Self { id: Uuid::nil(), time: datetime!(0001-01-01 0:00 UTC), title: String::new() }
            }
            Direction::Falling => Self {
                id: Uuid::max(),
                time: datetime!(9999-12-31 0:00 UTC),
                title: AFTER_ALL_TITLES.clone(),
            },
        };
        if let Some(after) = after {
            begin.id = after.id.as_uuid();
            match &after.key {
                Key::CreateTime => {}
                Key::UpdateTime(time) => begin.time = *time,
                Key::Title(title) => begin.title.clone_from(title),
            }
        }
        begin
    }
}
