//! The rows of a database, made by COPY. Which they are follows from their numbers, so
//! that callers find them without a list.

use bytes::Bytes;
use futures_util::SinkExt;
use tokio_postgres::Client;
use uuid::Uuid;

use crate::{Result, postgres::Database, scenario::PAGE_SIZE};

/// The instants of the first user and of the first to-do of each, in milliseconds since
/// 1970: the beginnings of 2023 and 2024.
pub const FIRST_USER: u64 = 1_672_531_200_000;
pub const FIRST_TODO: u64 = 1_704_067_200_000;

/// Rows are sent in pieces of about this size, in bytes.
const PIECE: usize = 64 * 1024;

/// To-dos of the one owner who has many: 10 000 pages of 10, and some to go on with. In a
/// small table, an eighth of all.
const MANY: u32 = 100_100;

/// The words of titles. One in [`WORDS`] contains each.
const WORDS: u32 = 10;
const VERBS: [&str; WORDS as usize] =
    ["Buy", "Fetch", "Find", "Return", "Order", "Count", "Pack", "Paint", "Sell", "Wash"];
const THINGS: [&str; WORDS as usize] =
    ["milk", "bread", "apples", "stamps", "paper", "chairs", "shoes", "fences", "books", "lamps"];

/// A word in the titles of some to-dos, and one in none.
pub const RARE: &str = "MILK";
pub const NEVER: &str = "no such words";

/// How many rows there are. The first user has many to-dos, the others share the rest.
#[derive(Clone, Copy, Debug)]
pub struct Fill {
    pub users: u32,
    pub todos: u32,
}

impl Fill {
    /// To-dos of the user who has many.
    pub fn many(self) -> u32 {
        MANY.min(self.todos / 8)
    }

    /// A page far into their list, counted from 1: 10 000 where there are as many.
    pub fn late_page(self) -> u32 {
        (self.many() / PAGE_SIZE.unsigned_abs()).saturating_sub(10).max(1)
    }

    /// To-dos of each other user, at the least.
    pub fn each(self) -> u32 {
        (self.todos - self.many()) / (self.users - 1)
    }

    /// To-dos of a user.
    fn of(self, user: u32) -> u32 {
        if user == 0 {
            return self.many();
        }
        let rest = (self.todos - self.many()) % (self.users - 1);
        self.each() + u32::from(user <= rest)
    }
}

/// The id of a user.
pub fn user_id(user: u32) -> Uuid {
    id(FIRST_USER + u64::from(user), 0)
}

/// The id of one of a user's to-dos, counted from 0.
pub fn todo_id(user: u32, todo: u32) -> Uuid {
    id(FIRST_TODO + u64::from(todo), user)
}

/// The name of a user.
pub fn username(user: u32) -> String {
    format!("user{user}")
}

/// UUIDv7 (RFC 9562, section 5.7) with a number instead of what is random.
fn id(milliseconds: u64, number: u32) -> Uuid {
    let (version, variant) = (7 << 76, 0b10 << 62);
    Uuid::from_u128(u128::from(milliseconds) << 80 | version | variant | u128::from(number))
}

/// Fills an empty database. All users get this hash of a password.
pub async fn fill(database: &Database, fill: Fill, password_hash: &str) -> Result<()> {
    let client = database.connect().await?;
    client.batch_execute("set maintenance_work_mem = '256MB'").await?;
    let rows = (0..fill.users).map(|user| user_row(user, password_hash));
    copy(&client, "users", rows).await?;
    // Much faster when they are made at once.
    let keys = Keys::drop(&client).await?;
    copy(&client, "todos", todo_rows(fill)).await?;
    keys.create(&client).await?;
    client.batch_execute("vacuum analyze").await?;
    // Not everybody may. It would come later, in the midst of the measurements.
    let _ = client.batch_execute("checkpoint").await;
    Ok(())
}

async fn copy(client: &Client, table: &str, rows: impl Iterator<Item = String>) -> Result<()> {
    let sink = client.copy_in::<_, Bytes>(&format!("copy {table} from stdin")).await?;
    let mut sink = std::pin::pin!(sink);
    let mut piece = String::with_capacity(2 * PIECE);
    for row in rows {
        piece.push_str(&row);
        if piece.len() >= PIECE {
            sink.send(std::mem::take(&mut piece).into()).await?;
        }
    }
    sink.send(piece.into()).await?;
    sink.finish().await?;
    Ok(())
}

fn user_row(user: u32, password_hash: &str) -> String {
    let (id, name, time) = (user_id(user), username(user), "2023-01-01 00:00:00+00");
    format!(
        "{id}\t{name}\t{name}\t{name}@example.com\t{name}@example.com\t{password_hash}\t1\t{time}\t1\n"
    )
}

/// In the order in which they would have come: the users take turns, and the one who has
/// many comes in between as often as needed.
fn todo_rows(fill: Fill) -> impl Iterator<Item = String> {
    let (many, others) = (u64::from(fill.many()), u64::from(fill.todos - fill.many()));
    let most = fill.of(1);
    let turns = (0..most).flat_map(move |todo| {
        (1..fill.users).filter(move |&user| todo < fill.of(user)).map(move |user| (user, todo))
    });
    let mut of_many = 0;
    turns.zip(1_u64..).flat_map(move |((user, todo), done)| {
        let due = u32::try_from(done * many / others).unwrap_or(u32::MAX);
        let between = (of_many..due).map(|todo| todo_row(0, todo));
        of_many = due;
        between.chain([todo_row(user, todo)])
    })
}

fn todo_row(user: u32, todo: u32) -> String {
    let (owner, id) = (user_id(user), todo_id(user, todo));
    let verb = VERBS[(todo / WORDS % WORDS) as usize];
    let title = format!("{verb} {} {todo}", THINGS[(todo % WORDS) as usize]);
    // Plain letters: folding is no more than this.
    let folded = title.to_lowercase();
    let description = "as many as there are, before the shops close and it gets dark";
    let (state, seconds) = (1 + todo % 5, todo / 1_000);
    let (hours, minutes) = (seconds / 3_600, seconds / 60 % 60);
    let time =
        format!("2024-01-01 {hours:02}:{minutes:02}:{:02}.{:03}+00", seconds % 60, todo % 1_000);
    format!("{owner}\t{id}\t{title}\t{folded}\t{description}\t{description}\t{state}\t{time}\t1\n")
}

/// The indexes and keys of the to-dos, as statements.
struct Keys(Vec<String>);

impl Keys {
    async fn drop(client: &Client) -> Result<Self> {
        let constraints = "
            select format('alter table todos drop constraint %I', conname),
                format('alter table todos add constraint %I %s', conname, pg_get_constraintdef(oid))
            from pg_constraint
            where conrelid = 'todos'::regclass and contype in ('p', 'u', 'f')";
        let indexes = "
            select format('drop index %s', indexrelid::regclass), pg_get_indexdef(indexrelid)
            from pg_index where indrelid = 'todos'::regclass";
        let mut create = Vec::new();
        // What a constraint has made goes with it.
        for statement in [constraints, indexes] {
            for row in client.query(statement, &[]).await? {
                client.batch_execute(row.get(0)).await?;
                create.push(row.get(1));
            }
        }
        Ok(Self(create))
    }

    async fn create(self, client: &Client) -> Result<()> {
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
    fn there_are_as_many_as_asked_for_and_each_has_their_own() {
        for (users, todos) in [(200, 20_000), (200, 20_123), (65, 1_000)] {
            let fill = Fill { users, todos };
            let rows: Vec<_> = todo_rows(fill).collect();
            assert_eq!(rows.len(), todos as usize);
            let mut owners = HashMap::<String, u32>::new();
            for row in rows {
                *owners.entry(row.split('\t').next().expect("an owner").to_owned()).or_default() +=
                    1;
            }
            assert_eq!(owners[&user_id(0).to_string()], fill.many());
            for user in 1..users {
                assert!(owners[&user_id(user).to_string()].abs_diff(fill.each()) <= 1);
            }
        }
    }

    #[test]
    fn ids_are_of_version_7_and_rise() {
        let ids = [todo_id(7, 0), todo_id(8, 0), todo_id(7, 1), todo_id(3, 2)];
        assert!(ids.is_sorted());
        assert!(ids.iter().all(|id| id.get_version_num() == 7));
    }
}
