//! The plans of all statements: in large tables PostgreSQL uses indexes and reads hardly more
//! than in small ones.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row};

use crate::support::postgres::TestDatabase;

/// The number of todos of each owner: more than a page, so that a sort of all would be visible.
const TODOS_PER_OWNER: u32 = 2_000;

/// The number of todos in small and in large tables. There are a tenth as many users, each with
/// a session.
const SMALL: u32 = 10_000;
const LARGE: u32 = 1_000_000;

/// The maximum number of sorted rows: a page and the next row.
const MAX_SORTED_ROWS: u32 = 1_001;

/// The maximum number of additional 8 KiB pages that a statement reads in large tables. An index
/// of a million rows has two levels more than one of a thousand. A statement writes to at most
/// four indexes and checks keys in two more.
const MAX_ADDITIONAL_BUFFERS: u64 = 24;

/// The time of the last write, in microseconds since 1970.
const NOW: i64 = 1_800_000_000_000_000;

/// The arguments of the statements that the compiler checks, by words that they contain: the
/// first entry applies. Arguments are SQL, in which `OWNER`, `TODO`, `GONE`, `NEW` and
/// `NONE` are ids, and `NOW` is a time.
const ARGUMENTS: [(&str, &str); 57] = [
    // Todos.
    (
        "for no key update skip locked ), clocks as",
        "array[OWNER], array[NEW], array['a'], array['a'], array['b'], array['b'], array[1::smallint], NOW",
    ),
    (
        "from clock, unnest( $2::uuid[], $3::text[]",
        "OWNER, array[NEW], array['a'], array['a'], array['b'], array['b'], array[1::smallint], NOW",
    ),
    // Deleted todos.
    ("fetch first ($2) rows with ties", "NOW - 2000000000000, 1000, 0"),
    ("with removed as ( delete from todo_trash", "OWNER, 0, NOW - 1400000000000, 1000"),
    ("update todo_trash set title = null", "OWNER, GONE, null, NOW, 0"),
    ("insert into todo_trash", "OWNER, TODO, null, NOW"),
    ("insert into todos as restored", "OWNER, GONE, NOW, 0"),
    ("as \"is_deleted!\"", "OWNER, GONE, 0"),
    ("from todo_trash where owner_id = $1 and version <", "OWNER, NOW, 101, 1000000, 200, 0"),
    // Changes.
    ("from database_incarnation as incarnation left join", "array[OWNER]"),
    ("update database_incarnation", "NEW"),
    ("select id from database_incarnation", "OWNER, 0, 101, 1000000, 208"),
    // Operators, and password resets.
    ("update users set password_hash = $4", "OWNER, sha256('a'), now(), 'x'"),
    ("insert into password_reset_codes", "OWNER, sha256('b'), now()"),
    ("from password_reset_codes as code join users", "OWNER, now()"),
    ("delete from password_reset_codes", "OWNER"),
    ("as \"tokens!\"", "OWNER, now()"),
    ("from users where id > $1 and ( $2::text", "NONE, null, 500"),
    ("update users set disabled_at = null", "OWNER"),
    ("disabled_at from users where id = $1", "OWNER"),
    ("as \"is_disabled!\" from users where id = $1", "OWNER"),
    ("update users set disabled_at = coalesce", "OWNER, now()"),
    // Users.
    ("from unnest($1::uuid[]) with ordinality as inputs (id", "array[OWNER]"),
    ("version from users where id = $1", "OWNER"),
    ("from users where id > $1", "OWNER, 0, 101"),
    ("select from users where username_folded = $1", "'user 5', OWNER"),
    ("from users where username_folded = $1", "'user 5'"),
    (
        "from users where email_folded = any($1::text[]) and id <> $2",
        "'{user 5@example.com}', OWNER",
    ),
    ("from users where email_folded = any($1::text[])", "'{user 5@example.com}'"),
    ("update users set email_folded = $3", "OWNER, 'x', 'y'"),
    ("insert into users", "NEW, 'a', 'a', 'a@b', 'a@b', 'x', 1, now(), 1"),
    ("update users set username", "OWNER, null, 'a', 'a', null, null, now()"),
    ("set password_hash = $3, password_version", "OWNER, 1, 'x'"),
    ("set password_hash = $3 where", "OWNER, 'x', 'y'"),
    ("delete from users", "OWNER, null"),
    // Personal access tokens. In the data, each user has one whose id is that of a todo.
    ("select user_id, id, secret_hash", "OWNER, TODO"),
    ("secret_hash, scopes, expires_at, last_used_date from unnest", "array[OWNER], array[TODO]"),
    ("and disabled_at is null for no key update", "OWNER, 1"),
    ("as \"count!\" from personal_access_tokens", "OWNER, now()"),
    (
        "insert into personal_access_tokens",
        "OWNER, NEW, 'a', array['todo.read'], now(), sha256('')",
    ),
    ("and id in ( select id from personal_access_tokens", "OWNER, now(), 50"),
    ("from personal_access_tokens where user_id = $1 order by", "OWNER, 100"),
    ("delete from personal_access_tokens where user_id = $1 and id = $2", "OWNER, TODO"),
    ("delete from personal_access_tokens where user_id = $1", "OWNER"),
    ("update personal_access_tokens", "OWNER, TODO, current_date"),
    ("select id from users where id = $1", "OWNER"),
    // Sessions.
    ("join sessions", "array[OWNER], array[TODO]"),
    ("select expires_at from sessions", "OWNER, TODO"),
    (
        "from sessions where user_id = $1 and expires_at > $2 order by id desc limit",
        "OWNER, now(), 101",
    ),
    ("insert into sessions", "OWNER, 1, NEW, now(), now(), '', ''"),
    ("update sessions", "OWNER, TODO, 0, now(), now()"),
    ("delete from sessions where user_id = $1 and ( expires_at", "OWNER, now(), 100"),
    ("delete from sessions where user_id = $1 and ((id", "OWNER, TODO, true, false"),
    ("delete from sessions where user_id = $1 and id", "OWNER, TODO, now()"),
    ("delete from sessions where user_id = $1", "OWNER"),
    // The database itself.
    ("current_setting", ""),
    ("lower(", ""),
];

/// Creates a database with this number of todos.
async fn create_database(todos: u32) -> (TestDatabase, PgConnection) {
    let database = TestDatabase::create().await;
    let mut sql = database.connect().await;
    for statement in [
        "create function id(kind int, number bigint) returns uuid immutable language sql
         return (lpad(to_hex(kind), 8, '0') || lpad(to_hex(number), 24, '0'))::uuid".to_owned(),
        format!(
            "insert into users select id(1, n), 'user ' || n, 'user ' || n, 'user ' || n || '@example.com',
                 'user ' || n || '@example.com', 'x', 1, now(), 1
             from generate_series(0, {} - 1) as n", todos / 10
        ),
        format!(
            "insert into sessions select id, id(2, {TODOS_PER_OWNER} * n::bigint + {TODOS_PER_OWNER} / 2), 0, now(),
                 now() + interval '1 day', 'agent', 'peer'
             from generate_series(0, {} - 1) as n, id(1, n)", todos / 10
        ),
        "insert into personal_access_tokens
         select user_id, id, 'name', '{todo.read}', expires_at, null, sha256('') from sessions"
            .to_owned(),
        "insert into password_reset_codes
             select id, sha256('a'), now() + interval '1 day' from users".to_owned(),
        format!(
            "insert into todo_clocks select id(1, n), {NOW} from generate_series(0, {} - 1) as n",
            todos / 10
        ),
        format!(
            "insert into todos select id(1, n / {TODOS_PER_OWNER}), id(2, n), title, title, about, about,
                 1 + n % 5, {NOW} - n * 1000000::bigint
             from generate_series(0, {todos} - 1) as n,
                 concat('title ', n * 7919::bigint % {todos}) as title, concat('all about ', n) as about"
        ),
        format!(
            "insert into todo_trash select id(1, n / {TODOS_PER_OWNER}), id(4, n), 'a', 'a', 'b', 'b', 1,
                 {NOW} - n * 1000000::bigint - 1
             from generate_series(0, {todos} - 1) as n"
        ),
        // The owner of the statements has many tombstones besides, half of them newer than the
        // deleted todos with content, and half of them older.
        format!(
            "insert into todo_trash (owner_id, id, version)
             select id(1, {todos} / {TODOS_PER_OWNER} / 2), id(5, n),
                 {NOW} - n % 2 * 1500000000000 - n - 2
             from generate_series(0, {todos} / 10 - 1) as n"
        ),
        "analyze".to_owned(),
        "vacuum users, sessions, personal_access_tokens, password_reset_codes, todo_clocks, todos,
             todo_trash"
            .to_owned(),
    ] {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut sql).await.expect("inserted");
    }
    (database, sql)
}

fn on_one_line(statement: &str) -> String {
    statement.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns the statements that the compiler checks, with their arguments.
fn checked_statements() -> Vec<(String, &'static str)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join(".sqlx");
    let mut unused = BTreeMap::from(ARGUMENTS);
    let mut statements = Vec::new();
    for file in fs::read_dir(directory).expect("a directory") {
        let text = fs::read_to_string(file.expect("a file").path()).expect("text");
        let json: Value = serde_json::from_str(&text).expect("JSON");
        let statement = json["query"].as_str().expect("a statement");
        let statement = on_one_line(statement);
        let known = ARGUMENTS.iter().find(|(words, _)| statement.contains(words));
        let (words, arguments) = known.unwrap_or_else(|| panic!("no arguments for {statement}"));
        unused.remove(words);
        statements.push((statement, *arguments));
    }
    assert!(unused.is_empty(), "no statement contains {unused:#?}");
    statements
}

/// Returns the statements of the lists and of the todos, which are built at run time, with
/// their arguments.
fn todo_statements() -> Vec<(String, String)> {
    let named = fast_zero::todo_statements();
    assert_eq!(named.len(), 6 + 6 * 6 + 2, "the lists have six orders and six variants");
    named.into_iter().map(|(name, text)| (on_one_line(text), todo_arguments(&name))).collect()
}

fn todo_arguments(name: &str) -> String {
    let known = match name {
        "todo_get" => "OWNER, TODO",
        "todo_get_batch" => "array[OWNER], array[TODO]",
        "todo_insert" => "OWNER, NEW, 'a', 'a', 'b', 'b', 1::smallint, NOW",
        "todo_update" => "OWNER, TODO, null, 'a', 'a', null, null, 2::smallint, NOW",
        "todo_update_batch" => {
            "array[OWNER], array[TODO], array[null::bigint], array['a'], array['a'], array['b'], array['b'], array[1::smallint], NOW"
        }
        "todo_update_group" => {
            "OWNER, array[TODO], array[null::bigint], array['a'], array['a'], array['b'], array['b'], array[1::smallint], NOW"
        }
        "todo_list_batch" => "array[OWNER, OWNER], array[NONE, TODO], array[101, 11]",
        "todo_list_batch_measured" => {
            "array[OWNER, OWNER], array[NONE, TODO], array[101, 11], 1000000, 160"
        }
        list => return list_arguments(list.strip_prefix("todo_list_").expect("a list")),
    };
    known.to_owned()
}

/// Returns the arguments of a list: owner, skip, limit, filters, sort key, and byte budget.
fn list_arguments(name: &str) -> String {
    let (name, limit, budget) = match name.strip_suffix("_measured") {
        Some(name) => (name, 101, ", 1000000, 160"),
        None => (name, 25, ""),
    };
    if let Some(key) = match name {
        "create_time" => Some("NONE"),
        "create_time_desc" => Some("TODO"),
        "update_time" => Some("0"),
        "update_time_desc" => Some("NOW"),
        "title" => Some("'', '', NONE"),
        "title_desc" => Some("'z', 'z', TODO"),
        _ => None,
    } {
        return format!("OWNER, 0, {limit}, {key}{budget}");
    }
    let (order, title_only) = match name.strip_suffix("_by_title") {
        Some(order) => (order, true),
        None => (name.strip_suffix("_filtered").expect("a filter"), false),
    };
    // A title that no todo contains makes the statement read all titles of the owner.
    let (filters, key) = match (order, title_only) {
        ("create_time", true) => ("'title 1', null, null", "NONE"),
        ("create_time", false) => ("null, null, null", "NONE"),
        ("create_time_desc", true) => ("'title 1', null, null", "TODO"),
        ("create_time_desc", false) => ("null, null, null", "TODO"),
        ("update_time", true) => ("'none', null, null", "0"),
        ("update_time", false) => ("null, null, null", "0"),
        ("update_time_desc", true) => ("'title 1', null, null", "NOW"),
        ("update_time_desc", false) => ("null, null, null", "NOW"),
        ("title", true) => ("'title 1', null, null", "'', '', NONE"),
        ("title", false) => ("'title', null, '{1,2}'", "'', '', NONE"),
        ("title_desc", true) => ("'none', null, null", "'z', 'z', TODO"),
        ("title_desc", false) => ("null, 'about', null", "'z', 'z', TODO"),
        _ => panic!("no arguments for the order {order}"),
    };
    format!("OWNER, 0, {limit}, {filters}, {key}{budget}")
}

/// Replaces the names of ids by those in the middle of the tables.
fn with_ids(arguments: &str, todos: u32) -> String {
    let owner = todos / TODOS_PER_OWNER / 2;
    let todo = owner * TODOS_PER_OWNER + TODOS_PER_OWNER / 2;
    let id = |kind: u32, number: u32| format!("'{kind:08x}-0000-0000-0000-{number:012x}'::uuid");
    arguments
        .replace("OWNER", &id(1, owner))
        .replace("TODO", &id(2, todo))
        .replace("NEW", &id(3, 0))
        .replace("NONE", &id(0, 0))
        .replace("GONE", &id(4, todo))
        .replace("NOW", &NOW.to_string())
}

/// Runs a statement, rolls it back, and returns its plan.
async fn explain(sql: &mut PgConnection, statement: &str, arguments: &str) -> Value {
    let arguments = if arguments.is_empty() { String::new() } else { format!("({arguments})") };
    let mut transaction = sql.begin().await.expect("started");
    let prepare =
        format!("set local plan_cache_mode = force_generic_plan; prepare it as {statement}");
    let explain = format!("explain (analyze, buffers, format json) execute it{arguments}");
    sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut *transaction).await.expect("prepared");
    let plan = sqlx::raw_sql(AssertSqlSafe(explain)).fetch_one(&mut *transaction).await;
    let plan = plan.unwrap_or_else(|error| panic!("{statement}: {error}"));
    let text: String = plan.try_get_unchecked(0).expect("text");
    transaction.rollback().await.expect("rolled back");
    sqlx::raw_sql("deallocate it").execute(sql).await.expect("deallocated");
    serde_json::from_str::<Value>(&text).expect("JSON")[0]["Plan"].take()
}

/// Returns all nodes of a plan.
fn nodes(plan: &Value) -> Vec<&Value> {
    let below = plan["Plans"].as_array().into_iter().flatten();
    std::iter::once(plan).chain(below.flat_map(nodes)).collect()
}

fn buffers(plan: &Value) -> u64 {
    let of = |name: &str| plan[name].as_u64().expect("a number");
    of("Shared Hit Blocks") + of("Shared Read Blocks")
}

#[test]
fn each_statement_has_arguments_and_all_arguments_have_a_statement() {
    assert!(!checked_statements().is_empty());
    assert!(!todo_statements().is_empty());
}

#[tokio::test]
#[ignore = "fills a table with a million rows: half a minute"]
async fn no_statement_reads_more_in_large_tables() {
    let (_small, mut small) = create_database(SMALL).await;
    let (_large, mut large) = create_database(LARGE).await;
    let mut buffers_by_statement = BTreeMap::new();
    let checked = checked_statements();
    let checked = checked.into_iter().map(|(text, arguments)| (text, arguments.to_owned()));
    for (statement, arguments) in checked.chain(todo_statements()) {
        let few = explain(&mut small, &statement, &with_ids(&arguments, SMALL)).await;
        let plan = explain(&mut large, &statement, &with_ids(&arguments, LARGE)).await;
        for node in nodes(&plan) {
            let kind = node["Node Type"].as_str().expect("a kind");
            let is_of_one_row = node["Relation Name"] == "database_incarnation";
            assert!(kind != "Seq Scan" || is_of_one_row, "{statement}\n{plan:#}");
            let sorted = node["Plans"].as_array().filter(|_| kind.contains("Sort"));
            for below in sorted.into_iter().flatten() {
                let rows = below["Actual Rows"].as_f64().expect("a number");
                assert!(rows <= f64::from(MAX_SORTED_ROWS), "{statement}\n{plan:#}");
            }
        }
        // The search of titles must not read the rows, which are scattered over the table.
        if statement.contains("id = any(array( select id from todos") {
            let mut nodes = nodes(&plan).into_iter();
            let is_of_index = nodes.any(|node| node["Node Type"] == "Index Only Scan");
            assert!(is_of_index, "{statement}\n{plan:#}");
        }
        let (few, many) = (buffers(&few), buffers(&plan));
        assert!(
            many <= few + MAX_ADDITIONAL_BUFFERS,
            "{few} buffers became {many}: {statement}\n{plan:#}"
        );
        buffers_by_statement.insert(statement, (few, many));
    }
    for (statement, (few, many)) in buffers_by_statement {
        println!("{few:>5} {many:>5}  {}", statement.chars().take(100).collect::<String>());
    }
}
