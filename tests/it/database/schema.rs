//! What the migrated schema holds: the order of versions, cheap clocks, and two tables of todos that
//! agree.

use std::collections::BTreeMap;

use sqlx::{Connection, PgConnection};

use crate::support::postgres::TestDatabase;

/// The columns of todos for which every statement gives a value.
const WRITTEN_COLUMNS: [&str; 8] = [
    "owner_id",
    "id",
    "title",
    "title_folded",
    "description",
    "description_folded",
    "state",
    "version",
];

/// Creates 1,000 owners with a clock each.
const OWNERS: &str = "
    insert into users
        select gen_random_uuid(), n, n, n, n, 'x', 1, now(), 1 from generate_series(1, 1000) as n;
    insert into todo_clocks select id, 1 from users;";

async fn execute(connection: &mut PgConnection, statements: &'static str) {
    sqlx::raw_sql(statements).execute(connection).await.expect("executed");
}

#[tokio::test]
async fn a_write_around_the_clock_is_rejected() {
    let database = TestDatabase::create().await;
    let mut connection = database.connect().await;
    execute(&mut connection, OWNERS).await;
    let todo = "insert into todos
        select owner_id, gen_random_uuid(), 'a', 'a', '', '', 1, version from todo_clocks";
    let deleted = "insert into todo_trash (owner_id, id, version)
        select owner_id, gen_random_uuid(), version from todo_clocks";
    for (statement, key) in
        [(todo, "todos_owner_version_key"), (deleted, "todo_trash_owner_version_key")]
    {
        execute(&mut connection, statement).await;
        let rejected = sqlx::raw_sql(statement).execute(&mut connection).await;
        let rejected = rejected.expect_err("the version exists").into_database_error();
        let rejected = rejected.expect("an error of PostgreSQL");
        assert!(rejected.is_unique_violation(), "{rejected}");
        assert_eq!(rejected.constraint(), Some(key));
    }
}

/// HOT: the new row is on the page of the old one, and no index changes.
#[tokio::test]
async fn updates_of_clocks_are_hot() {
    let database = TestDatabase::create().await;
    let mut connection = database.connect().await;
    execute(&mut connection, OWNERS).await;
    let mut transaction = connection.begin().await.expect("started");
    execute(&mut transaction, "update todo_clocks set version = version + 1").await;
    let counts = "select n_tup_upd, n_tup_hot_upd from pg_stat_xact_user_tables
        where relname = 'todo_clocks'";
    let counts: (i64, i64) =
        sqlx::query_as(counts).fetch_one(&mut *transaction).await.expect("a row");
    assert_eq!(counts, (1_000, 1_000));
}

/// Returns the columns of a table with their types and defaults.
async fn columns(
    connection: &mut PgConnection,
    table: &str,
) -> BTreeMap<String, (String, Option<String>)> {
    let columns = sqlx::query_as(
        "select attname::text,
             concat_ws(' ', format_type(atttypid, atttypmod), nullif(attcollation, 0)::regcollation),
             pg_get_expr(adbin, adrelid)
         from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
         where attrelid = $1::regclass and attnum > 0 and not attisdropped",
    );
    let columns: Vec<(String, String, Option<String>)> =
        columns.bind(table).fetch_all(connection).await.expect("columns");
    columns.into_iter().map(|(name, kind, default)| (name, (kind, default))).collect()
}

/// Statements name the columns that they move between the tables. A version that does not know a
/// column leaves it out: the default of either table then applies.
#[tokio::test]
async fn todos_and_deleted_todos_have_the_same_columns() {
    let database = TestDatabase::create().await;
    let mut connection = database.connect().await;
    let todos = columns(&mut connection, "todos").await;
    assert_eq!(todos, columns(&mut connection, "todo_trash").await);
    for (name, (_, default)) in &todos {
        let is_written = WRITTEN_COLUMNS.contains(&&**name);
        assert!(is_written || default.is_some(), "{name} needs a default");
    }
}
