//! Lists that share a statement.

use sqlx::{PgConnection, Row, postgres::PgRow};
use uuid::Uuid;

use super::{
    TodoFilter,
    list::{
        MAX_PAGE_BYTES, MAX_UNMEASURED_PAGE_SIZE, StartAfter, TODO_OVERHEAD_BYTES, TodoPage, list,
    },
    order::{OrderBy, SortDirection, TodoCursor},
    row::{TODO_COLUMN_COUNT, todo_columns},
};
use crate::{
    database::batch::BatchQuery,
    rpc::{error::Error, page_token::PageRequest},
    types::id::UserId,
};

/// The largest page that shares a statement with others: none takes much longer than the others,
/// which wait for it.
///
/// Test: `pages_of_more_than_a_hundred_todos_share_no_statement`.
const MAX_BATCHABLE_PAGE_SIZE: i64 = 100;

/// A page that can share a statement with others: by creation, without a filter, not large. Most
/// lists are like this.
#[derive(Debug)]
pub(super) struct BatchablePage {
    owner_id: UserId,
    page: PageRequest<TodoCursor>,
}

impl BatchablePage {
    const ORDER_BY: OrderBy = OrderBy::CreateTime(SortDirection::Ascending);

    /// Returns the page unchanged if it has to run alone.
    pub(super) fn new(
        owner_id: UserId,
        filter: &TodoFilter,
        order_by: OrderBy,
        page: PageRequest<TodoCursor>,
    ) -> Result<Self, PageRequest<TodoCursor>> {
        let is_batchable = *filter == TodoFilter::UNFILTERED
            && order_by == Self::ORDER_BY
            && page.skip == 0
            && page.size <= MAX_BATCHABLE_PAGE_SIZE;
        if is_batchable { Ok(Self { owner_id, page }) } else { Err(page) }
    }

    fn start_after(&self) -> Uuid {
        StartAfter::new(Self::ORDER_BY, self.page.after.as_ref()).id
    }
}

/// Lists several batchable pages, each of its owner.
const LIST_BATCH: &str = concat!(
    "select ",
    todo_columns!(),
    ", candidates, ordinal
     from unnest($1::uuid[], $2::uuid[], $3::bigint[]) with ordinality
         as inputs (input_owner_id, start_after, size, ordinal)
     cross join lateral (
         select *,
             count(*) over () as candidates,
             row_number() over running as position,
             sum(octet_length(title) + octet_length(description) + $5::int)
                 over running as bytes
         from (
             select ",
    todo_columns!(),
    " from todos
             where owner_id = input_owner_id and id > start_after
             order by id
             limit size
         ) as page_rows
         window running as (order by id rows unbounded preceding)
     ) as page
     where position = 1 or bytes <= $4"
);

/// The same for pages that never exceed the byte budget.
const LIST_BATCH_UNMEASURED: &str = concat!(
    "select page.*, ordinal
     from unnest($1::uuid[], $2::uuid[], $3::bigint[]) with ordinality
         as inputs (input_owner_id, start_after, size, ordinal)
     cross join lateral (
         select ",
    todo_columns!(),
    " from todos
         where owner_id = input_owner_id and id > start_after
         order by id
         limit size
     ) as page"
);

/// Lists batchable pages.
#[derive(Debug)]
pub(super) struct ListBatchablePages;

impl BatchQuery for ListBatchablePages {
    type Input = BatchablePage;
    type Output = TodoPage;

    async fn run_one(
        connection: &mut PgConnection,
        BatchablePage { owner_id, page }: &BatchablePage,
    ) -> Result<TodoPage, Error> {
        let (filter, order_by) = (TodoFilter::UNFILTERED, BatchablePage::ORDER_BY);
        list(connection, *owner_id, &filter, order_by, page).await
    }

    async fn run_batch(
        connection: &mut PgConnection,
        inputs: &[BatchablePage],
    ) -> Result<Vec<Option<TodoPage>>, Error> {
        let owner_ids: Vec<_> = inputs.iter().map(|input| input.owner_id.as_uuid()).collect();
        let start_after: Vec<_> = inputs.iter().map(BatchablePage::start_after).collect();
        let limits: Vec<_> = inputs.iter().map(|input| input.page.size + 1).collect();
        let measured = inputs.iter().any(|input| input.page.size > MAX_UNMEASURED_PAGE_SIZE);
        let text = if measured { LIST_BATCH } else { LIST_BATCH_UNMEASURED };
        let mut query = sqlx::query(text).bind(owner_ids).bind(start_after).bind(limits);
        if measured {
            query = query.bind(MAX_PAGE_BYTES).bind(TODO_OVERHEAD_BYTES);
        }
        let candidates = measured.then_some(TODO_COLUMN_COUNT);
        let ordinal = TODO_COLUMN_COUNT + usize::from(measured);
        let mut pages: Vec<_> = inputs.iter().map(|_| Vec::new()).collect();
        for row in query.fetch_all(connection).await? {
            let index = usize::try_from(row.try_get::<i64, _>(ordinal)? - 1);
            let page = index.ok().and_then(|index| pages.get_mut(index));
            page.ok_or_else(|| Error::internal("a row belongs to no page"))?.push(row);
        }
        let pages = pages.into_iter().zip(inputs).map(|(mut rows, input)| {
            // The database promises no order of the rows of a join.
            rows.sort_by_cached_key(|row: &PgRow| row.try_get::<Uuid, _>(0).ok());
            TodoPage::new(&rows, input.page.size, candidates).ok()
        });
        Ok(pages.collect())
    }
}

/// The statements of this module, with their names.
pub(super) const STATEMENTS: [(&str, &str); 2] =
    [("todo_list_batch", LIST_BATCH_UNMEASURED), ("todo_list_batch_measured", LIST_BATCH)];
