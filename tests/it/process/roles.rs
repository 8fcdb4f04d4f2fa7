//! The roles of the database in `docs/deployment.md`: one migrates, the other serves.

use sqlx::{AssertSqlSafe, ConnectOptions, error::DatabaseError};
use tonic_health::pb::health_check_response::ServingStatus;

use crate::support::{
    Client,
    app::{connect, unique_name},
    health::check_health,
    postgres::TestDatabase,
    process::Binary,
    readme::DEPLOYMENT,
    wait::wait_until,
};

/// The roles and the database of the document.
const OWNER: &str = "fast_zero_owner";
const APP: &str = "fast_zero_app";

/// Returns the statements of the document for this database and these roles.
fn statements(database: &str, owner: &str, app: &str) -> String {
    let (_, sql) = DEPLOYMENT.split_once("```sql\n").expect("statements");
    let lines = sql.split("```").next().unwrap_or(sql).lines().map(|line| {
        let create = "create database fast_zero owner fast_zero_owner";
        match line {
            // The database of the test exists.
            _ if line.starts_with(create) => format!("alter database {database} owner to {OWNER};"),
            _ if line.starts_with("\\connect") => String::new(),
            _ => line.to_owned(),
        }
    });
    lines.collect::<Vec<_>>().join("\n").replace(OWNER, owner).replace(APP, app)
}

#[tokio::test]
async fn the_service_needs_no_right_to_change_the_schema() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let (owner, app) = (unique_name("owner"), unique_name("app"));
    let name = database.options.get_database().expect("a name").to_owned();
    let execute = async |statements: String| {
        let mut connection = database.connect().await;
        sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut connection).await.expect("executed");
    };
    execute(statements(&name, &owner, &app)).await;
    let url = |role: &str, password: &str| {
        let options = database.options.clone().username(role).password(password);
        options.to_url_lossy().to_string()
    };

    let migrate = Binary::new(&["migrate"]).env("DATABASE_URL", &url(&owner, "one password"));
    let (code, output) = migrate.output().await;
    assert_eq!(code, Some(0), "{output}");
    let app_url = url(&app, "another password");
    let server = Binary::server(&app_url).env("MIGRATE_ON_START", "false").start();
    let address = server.address().await.parse().expect("an address");
    let ana = Client::new(connect(address).await).signed_up("ana").await;
    let todo = ana.create_todo("Read").await;
    ana.try_delete_todo(&todo.id, "").await.expect("deleted");
    ana.try_delete_user("me", "").await.expect("deleted");

    let options = database.options.clone().username(&app).password("another password");
    let mut connection = options.connect().await.expect("connected");
    for statement in
        ["create table other ()", "alter table todos add other int", "drop table todos"]
    {
        let rejected = sqlx::raw_sql(statement).execute(&mut connection).await;
        let rejected = rejected.expect_err(statement);
        let code = rejected.as_database_error().and_then(DatabaseError::code);
        assert_eq!(code.as_deref(), Some("42501"), "{statement}: {rejected}");
    }
    drop((server, connection));
    execute(format!(
        "alter database {name} owner to current_user; drop owned by {app} cascade; \
         drop owned by {owner} cascade; drop role {owner}, {app}"
    ))
    .await;
}

/// A migrated database, and a role with some of the privileges that the service needs.
#[tokio::test]
async fn a_role_without_a_privilege_is_rejected_or_not_ready() {
    let database = TestDatabase::create().await;
    let role = unique_name("role");
    let execute = async |statement: &str| {
        let statement = statement.replace("ROLE", &role);
        let mut sql = database.connect().await;
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut sql).await.expect("executed");
    };
    execute("create role ROLE login password 'one password'").await;
    let options = database.options.clone().username(&role).password("one password");
    let url = options.to_url_lossy().to_string();
    let server = || Binary::server(&url).env("MIGRATE_ON_START", "false");

    let (code, output) = server().output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("table _sqlx_migrations"), "{output}");
    assert!(output.contains("grant the role of DATABASE_URL"), "{output}");

    execute("grant select on all tables in schema public to ROLE").await;
    let (code, output) = server().output().await;
    assert_eq!(code, Some(1), "{output}");
    let tables = "select array_agg(tablename::text) from pg_tables
                  where schemaname = 'public' and tablename <> '_sqlx_migrations'";
    let tables = sqlx::query_scalar(tables).fetch_one(&mut database.connect().await).await;
    let tables: Vec<String> = tables.expect("listed");
    for table in tables {
        assert!(output.contains(&format!("insert on {table}")), "{table}: {output}");
    }

    execute(
        "grant insert, update, delete on all tables in schema public to ROLE;
         revoke insert, update, delete on todos from ROLE",
    )
    .await;
    let (code, output) = server().output().await;
    assert_eq!(code, Some(1), "{output}");
    let missing = "lacks insert on todos, update on todos, delete on todos: grant the role";
    assert!(output.contains(missing), "{output}");

    execute("grant all on todos to ROLE").await;
    let server = server().start();
    let address = server.address().await.parse().expect("an address");
    let channel = connect(address).await;
    for (statement, status) in [
        ("revoke insert on todos from ROLE", ServingStatus::NotServing),
        ("grant insert on todos to ROLE", ServingStatus::Serving),
        ("revoke update on todo_clocks from ROLE", ServingStatus::NotServing),
        ("grant update on todo_clocks to ROLE", ServingStatus::Serving),
        ("revoke delete on todo_trash from ROLE", ServingStatus::NotServing),
        ("grant delete on todo_trash to ROLE", ServingStatus::Serving),
    ] {
        execute(statement).await;
        wait_until(statement, async || check_health(&channel, "").await == status).await;
    }
    drop(server);
    execute("drop owned by ROLE cascade; drop role ROLE").await;
}

/// A new table needs an entry in the list of `src/database/state.rs`.
#[tokio::test]
async fn the_privileges_on_all_tables_are_checked() {
    let database = TestDatabase::create().await;
    let role = unique_name("role");
    let mut sql = database.connect().await;
    let setup = format!(
        "create role {role} login password 'one password'; \
         grant select on _sqlx_migrations to {role}"
    );
    sqlx::raw_sql(AssertSqlSafe(setup)).execute(&mut sql).await.expect("executed");
    let url = database.options.clone().username(&role).password("one password").to_url_lossy();
    let server = Binary::server(url.as_str()).env("MIGRATE_ON_START", "false");
    let (code, output) = server.output().await;
    assert_eq!(code, Some(1), "{output}");
    let tables = "select tablename::text from pg_tables
        where schemaname = 'public' and tablename <> '_sqlx_migrations'";
    let tables: Vec<String> = sqlx::query_scalar(tables).fetch_all(&mut sql).await.expect("tables");
    for table in tables {
        for privilege in ["select", "insert", "update", "delete"] {
            let missing = format!("{privilege} on {table}");
            assert!(output.contains(&missing), "{missing}: {output}");
        }
    }
    let teardown = format!("drop owned by {role} cascade; drop role {role}");
    sqlx::raw_sql(AssertSqlSafe(teardown)).execute(&mut sql).await.expect("executed");
}
