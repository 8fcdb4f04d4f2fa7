//! The rows of a dataset, written with COPY.
//!
//! All IDs and names follow from the numbers of users and todos, so the fixtures and
//! pgbench need no list of them.

use bytes::Bytes;
use futures_util::SinkExt;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{error::Result, postgres::Database};

/// The creation time of the first user, in milliseconds since 1970 (start of 2023).
pub const FIRST_USER_MS: u64 = 1_672_531_200_000;
/// The creation time of each user's first todo, in milliseconds since 1970 (start of 2024).
pub const FIRST_TODO_MS: u64 = 1_704_067_200_000;

/// The page size of all measured lists.
pub const PAGE_SIZE: u32 = 10;

/// How many todos the owner of the long list has: 10,000 pages and a remainder. In a small
/// dataset, they have an eighth of all todos.
const LONG_LIST_LEN: u32 = 100_100;

/// The approximate size of one COPY message.
const COPY_CHUNK_BYTES: usize = 64 * 1024;

/// The number of verbs and of nouns in titles. Each word is in one of `WORD_COUNT` titles.
const WORD_COUNT: u32 = 10;
const VERBS: [&str; WORD_COUNT as usize] =
    ["Buy", "Fetch", "Find", "Return", "Order", "Count", "Pack", "Paint", "Sell", "Wash"];
const NOUNS: [&str; WORD_COUNT as usize] =
    ["milk", "bread", "apples", "stamps", "paper", "chairs", "shoes", "fences", "books", "lamps"];

/// A filter that matches one title in ten, and only if it ignores case.
pub const MATCHING_TITLE: &str = "MILK";
/// A filter that matches no title.
pub const UNMATCHED_TITLE: &str = "no such words";

/// The number of rows in a dataset. User 0 owns the long list; the other users own equal
/// parts of the rest.
#[derive(Clone, Copy, Debug)]
pub struct DatasetSize {
    pub users: u32,
    pub todos: u32,
}

impl DatasetSize {
    /// Returns the number of todos in the long list.
    pub fn long_list_len(self) -> u32 {
        LONG_LIST_LEN.min(self.todos / 8)
    }

    /// Returns the number of a page near the end of the long list, counted from 1: page
    /// 10,000 if the list is that long.
    pub fn deep_page(self) -> u32 {
        (self.long_list_len() / PAGE_SIZE).saturating_sub(10).max(1)
    }

    /// Returns the minimum number of todos of each user other than user 0.
    pub fn min_todos_per_user(self) -> u32 {
        (self.todos - self.long_list_len()) / (self.users - 1)
    }

    fn todos_of(self, user: u32) -> u32 {
        if user == 0 {
            return self.long_list_len();
        }
        let remainder = (self.todos - self.long_list_len()) % (self.users - 1);
        self.min_todos_per_user() + u32::from(user <= remainder)
    }
}

pub fn user_id(user: u32) -> Uuid {
    uuid_v7(FIRST_USER_MS + u64::from(user), 0)
}

/// Returns the ID of a user's todo. Todos are counted from 0 for each user.
pub fn todo_id(user: u32, todo: u32) -> Uuid {
    uuid_v7(FIRST_TODO_MS + u64::from(todo), user)
}

pub fn username(user: u32) -> String {
    format!("user{user}")
}

/// Returns a `UUIDv7` (RFC 9562, section 5.7) with a number in the random bits.
fn uuid_v7(milliseconds: u64, number: u32) -> Uuid {
    let (version, variant) = (7 << 76, 0b10 << 62);
    Uuid::from_u128(u128::from(milliseconds) << 80 | version | variant | u128::from(number))
}

/// The columns of the rows. Others have their defaults.
const USER_COLUMNS: &str = "users (id, username, username_folded, email, email_folded,
    password_hash, password_version, updated_at, version)";
const TODO_COLUMNS: &str = "todos (owner_id, id, title, title_folded, description,
    description_folded, state, version)";

/// Fills an empty, migrated database. All users get the same password hash.
pub async fn seed(database: &Database, size: DatasetSize, password_hash: &str) -> Result<()> {
    let client = database.connect().await?;
    client.batch_execute("set maintenance_work_mem = '256MB'").await?;
    let rows = (0..size.users).map(|user| user_row(user, password_hash));
    copy(&client, USER_COLUMNS, rows).await?;
    copy(&client, "todo_clocks", (0..size.users).map(clock_row)).await?;
    // Building an index once is much faster than updating it for each row.
    let indexes = TodoIndexes::drop(&client).await?;
    copy(&client, TODO_COLUMNS, todo_rows(size)).await?;
    indexes.recreate(&client).await?;
    client.batch_execute("vacuum analyze").await?;
    // Without a checkpoint here, one would run during the measurements. Not every role
    // has the privilege.
    let _ = client.batch_execute("checkpoint").await;
    Ok(())
}

async fn copy(client: &Client, columns: &str, rows: impl Iterator<Item = String>) -> Result<()> {
    let sink = client.copy_in::<_, Bytes>(&format!("copy {columns} from stdin")).await?;
    let mut sink = std::pin::pin!(sink);
    let mut chunk = String::with_capacity(2 * COPY_CHUNK_BYTES);
    for row in rows {
        chunk.push_str(&row);
        if chunk.len() >= COPY_CHUNK_BYTES {
            sink.send(std::mem::take(&mut chunk).into()).await?;
        }
    }
    sink.send(chunk.into()).await?;
    sink.finish().await?;
    Ok(())
}

fn user_row(user: u32, password_hash: &str) -> String {
    let (id, name, time) = (user_id(user), username(user), "2023-01-01 00:00:00+00");
    format!(
        "{id}\t{name}\t{name}\t{name}@example.com\t{name}@example.com\t{password_hash}\t1\t{time}\t1\n"
    )
}

fn clock_row(user: u32) -> String {
    format!("{}\t{}\n", user_id(user), version(u32::MAX))
}

/// Returns the version of a user's todo, counted from 0: the time of its creation in microseconds.
fn version(todo: u32) -> u64 {
    1_000 * (FIRST_TODO_MS + u64::from(todo))
}

/// Returns the rows in the order in which a service would have created them.
///
/// The users create todos in rotation, so one user's rows are far apart in the table. The
/// rows of the long list are spread evenly between them.
fn todo_rows(size: DatasetSize) -> impl Iterator<Item = String> {
    let long_list = u64::from(size.long_list_len());
    let others = u64::from(size.todos) - long_list;
    let rotation = (0..size.todos_of(1)).flat_map(move |todo| {
        let users = (1..size.users).filter(move |&user| todo < size.todos_of(user));
        users.map(move |user| (user, todo))
    });
    let mut written = 0;
    rotation.zip(1_u64..).flat_map(move |((user, todo), count)| {
        let due = u32::try_from(count * long_list / others).unwrap_or(u32::MAX);
        let of_long_list = (written..due).map(|todo| todo_row(0, todo));
        written = due;
        of_long_list.chain([todo_row(user, todo)])
    })
}

fn todo_row(user: u32, todo: u32) -> String {
    let (owner, id) = (user_id(user), todo_id(user, todo));
    let verb = VERBS[(todo / WORD_COUNT % WORD_COUNT) as usize];
    let title = format!("{verb} {} {todo}", NOUNS[(todo % WORD_COUNT) as usize]);
    // For ASCII text, this equals the case folding of the service.
    let folded = title.to_lowercase();
    let description = "as many as there are, before the shops close and it gets dark";
    let (state, version) = (1 + todo % 5, version(todo));
    format!("{owner}\t{id}\t{title}\t{folded}\t{description}\t{description}\t{state}\t{version}\n")
}

/// The statements that recreate the dropped constraints and indexes of `todos`.
struct TodoIndexes(Vec<String>);

impl TodoIndexes {
    async fn drop(client: &Client) -> Result<Self> {
        let constraints = "
            select format('alter table todos drop constraint %I', conname),
                format('alter table todos add constraint %I %s', conname, pg_get_constraintdef(oid))
            from pg_constraint
            where conrelid = 'todos'::regclass and contype in ('p', 'u', 'f')";
        let indexes = "
            select format('drop index %s', indexrelid::regclass), pg_get_indexdef(indexrelid)
            from pg_index where indrelid = 'todos'::regclass";
        let mut statements = Vec::new();
        // The constraints come first: dropping a constraint also drops its index.
        for query in [constraints, indexes] {
            for row in client.query(query, &[]).await? {
                client.batch_execute(row.get(0)).await?;
                statements.push(row.get(1));
            }
        }
        Ok(Self(statements))
    }

    async fn recreate(self, client: &Client) -> Result<()> {
        for statement in self.0 {
            client.batch_execute(&statement).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn each_user_has_the_computed_number_of_todos() {
        for (users, todos) in [(200, 20_000), (200, 20_123), (65, 1_000)] {
            let size = DatasetSize { users, todos };
            let rows: Vec<_> = todo_rows(size).collect();
            assert_eq!(rows.len(), todos as usize);
            let mut owners = HashMap::<String, u32>::new();
            for row in rows {
                let owner = row.split('\t').next().expect("an owner");
                *owners.entry(owner.to_owned()).or_default() += 1;
            }
            assert_eq!(owners[&user_id(0).to_string()], size.long_list_len());
            for user in 1..users {
                let count = owners[&user_id(user).to_string()];
                assert!(count.abs_diff(size.min_todos_per_user()) <= 1);
            }
        }
    }

    #[test]
    fn ids_are_ascending_version_7_uuids() {
        let ids = [todo_id(7, 0), todo_id(8, 0), todo_id(7, 1), todo_id(3, 2)];
        assert!(ids.is_sorted());
        assert!(ids.iter().all(|id| id.get_version_num() == 7));
    }
}
