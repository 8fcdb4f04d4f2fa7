//! The migration of a database that the first release filled.

use std::borrow::Cow;

use sqlx::{Connection, PgConnection, migrate::Migrator};

use crate::support::{
    App, PASSWORD,
    app::config,
    postgres::{MIGRATIONS, TestDatabase},
    readme::DEPLOYMENT,
};

/// The migrations of the first release.
const FIRST_RELEASE: usize = 4;

/// Three owners with todos and one without. Times of updates repeat, also across owners, and follow
/// each other by a microsecond. `ana` is a copy of a user who can log in.
const DATA: &str = "
    create function id(kind int, number bigint) returns uuid immutable language sql
        return (lpad(to_hex(kind), 8, '0') || lpad(to_hex(number), 24, '0'))::uuid;
    insert into users
        select id(1, n), 'user' || n, 'user' || n, 'user' || n || '@example.com',
            'user' || n || '@example.com', 'x', 1, now(), 1
        from generate_series(0, 3) as n;
    insert into todos
        select id(1, n % 3), id(2, n), 'title ' || n, 'title ' || n, '', '', 1 + n % 5,
            timestamptz '2026-03-29 01:59:59.999998Z' + n * 7919 % 50 * interval '1 microsecond',
            1 + n % 4
        from generate_series(0, 8999) as n;
    insert into todos values
        (id(1, 0), id(3, 0), 'new', 'new', '', '', 1, '2026-04-01T12:00:00.123456Z', 9);";

async fn migrate(database: &TestDatabase, steps: usize) -> PgConnection {
    let mut connection = database.connect().await;
    let migrations = Cow::Owned(MIGRATIONS.iter().take(steps).cloned().collect());
    let migrator = Migrator { migrations, ..sqlx::migrate!() };
    migrator.run(&mut connection).await.expect("migrated");
    connection
}

async fn first_release() -> TestDatabase {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let mut connection = migrate(&database, FIRST_RELEASE).await;
    sqlx::raw_sql(DATA).execute(&mut connection).await.expect("inserted");
    connection.close().await.expect("closed");
    database
}

async fn count(connection: &mut PgConnection, statement: &'static str) -> i64 {
    sqlx::query_scalar(statement).fetch_one(connection).await.expect("a count")
}

#[tokio::test]
async fn versions_follow_the_times_of_the_first_release() {
    let database = first_release().await;
    let mut old = database.connect().await;
    let copy = "create table old_todos as select * from todos";
    sqlx::raw_sql(copy).execute(&mut old).await.expect("copied");
    let mut connection = migrate(&database, usize::MAX).await;
    assert_eq!(count(&mut connection, "select count(*) from todos").await, 9_001);
    let unordered = "select count(*) from (
            select new.version, lag(new.version) over (
                partition by owner_id order by old.updated_at, id
            ) as before
            from old_todos as old join todos as new using (owner_id, id)
        ) as ordered where version <= before";
    assert_eq!(count(&mut connection, unordered).await, 0, "in the order of the updates");
    let early = "select count(*) from old_todos as old join todos as new using (owner_id, id)
        where new.version < extract(epoch from updated_at) * 1000000";
    assert_eq!(count(&mut connection, early).await, 0, "not before the update");
    let late = "select count(*) from old_todos as old join todos as new using (owner_id, id)
        where new.version > extract(epoch from updated_at) * 1000000 + 3000";
    assert_eq!(count(&mut connection, late).await, 0, "as close to it as ties allow");
    let unique = "select version from todos where id = id(3, 0)";
    assert_eq!(count(&mut connection, unique).await, 1_775_044_800_123_456, "equal without ties");
    let clocks = "select count(*) from todo_clocks as clock
        where version = (select max(version) from todos where owner_id = clock.owner_id)";
    assert_eq!(count(&mut connection, clocks).await, 3);
    assert_eq!(count(&mut connection, "select count(*) from todo_clocks").await, 3);
}

#[tokio::test]
async fn a_migrated_database_works() {
    let database = first_release().await;
    // Applies the missing migrations.
    let app = App::start_on(database, config()).await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "update users set password_hash = (
             select password_hash from users where username = 'ana'
         ) where username in ('user0', 'user3')",
    )
    .await;
    for (name, len) in [("user0", 3_001), ("user3", 0)] {
        let user = ana.logged_in(name, PASSWORD).await.expect("logged in");
        let request = fast_zero::proto::todo::v1::ListTodosRequest {
            order_by: "update_time desc".into(),
            ..<_>::default()
        };
        let todos = user.list_all_todos(request.clone()).await;
        assert_eq!(todos.len(), len);
        let created = user.create_todo("created").await;
        assert_eq!(user.list_todos(request).await.todos[0], created, "the newest change");
        for todo in todos.iter().take(2) {
            let deleted = user.delete_todo(&todo.id).await;
            assert_eq!(deleted.todo.expect("a todo").title, todo.title);
            assert_eq!(user.undelete_todo(&todo.id).await.title, todo.title);
        }
        user.try_delete_user("me", "").await.expect("deleted");
    }
}

#[tokio::test]
async fn the_first_release_cannot_create_or_update_todos_during_the_migration() {
    let database = first_release().await;
    let mut connection = migrate(&database, FIRST_RELEASE + 2).await;
    for statement in [
        "insert into todos (
             owner_id, id, title, title_folded, description, description_folded, state,
             updated_at, version
         ) values (id(1, 1), id(3, 1), 'a', 'a', '', '', 1, now(), 1)",
        "update todos set updated_at = now(), version = version + 1 where id = id(2, 1)",
    ] {
        let error = sqlx::raw_sql(statement).execute(&mut connection).await;
        let error = error.expect_err("the column has another name").into_database_error();
        let code = error.and_then(|error| error.code().map(std::borrow::Cow::into_owned));
        assert_eq!(code.as_deref(), Some("42703"), "{statement}");
    }
    migrate(&database, usize::MAX).await;
}

/// Why `docs/deployment.md` says to stop the first release before the migration. If the schema
/// rejects its deletions one day, the document can say so.
#[tokio::test]
async fn deletions_by_the_first_release_leave_no_trace() {
    let database = first_release().await;
    let mut connection = migrate(&database, usize::MAX).await;
    let clock = "select version from todo_clocks where owner_id = id(1, 1)";
    let before = count(&mut connection, clock).await;
    let delete = "delete from todos
        where owner_id = id(1, 1) and id = id(2, 1) and (null::bigint is null or version = null)";
    let deleted = sqlx::raw_sql(delete).execute(&mut connection).await.expect("deleted");
    assert_eq!(deleted.rows_affected(), 1);
    assert_eq!(count(&mut connection, clock).await, before);
    assert_eq!(count(&mut connection, "select count(*) from todo_trash").await, 0);
    let upgrades = DEPLOYMENT.split_once("## Upgrades of the service").expect("a section").1;
    assert!(upgrades.contains("stop all replicas of 0.1.0"));
    assert!(upgrades.contains("kubectl scale --replicas=0"));
}
