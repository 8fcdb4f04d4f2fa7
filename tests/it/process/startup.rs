//! Startup, before and after the migration.

use std::net::SocketAddr;

use fast_zero::{Config, Server, proto::todo::v1::ListTodosRequest};
use sqlx::AssertSqlSafe;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt;

use crate::support::{
    Client,
    app::{config, config_with, connect},
    assert::assert_status,
    health::{LIVENESS_SERVICE, READINESS_SERVICES, check_health},
    postgres::{MIGRATIONS, TestDatabase},
    raw_client::RawClient,
    wait::{wait_until, with_timeout},
};

/// A starting server, which may never serve.
struct Starting {
    address: SocketAddr,
    server_task: JoinHandle<Result<(), Box<dyn std::error::Error + Send + Sync>>>,
    _stop: DropGuard,
}

async fn start(database: &TestDatabase, mut config: Config) -> Starting {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("a bound listener");
    config.database.database_url = Some(database.url().into());
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone().drop_guard();
    let server_task = async move {
        let server = Server::start(listener, &config).await?;
        server.run(&config, |_| (), shutdown).await
    };
    Starting { address, server_task: tokio::spawn(server_task), _stop: stop }
}

#[tokio::test]
async fn before_the_migration_the_server_is_live_but_not_serving() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let starting = start(
        &database,
        config_with(|config| {
            config.lifecycle.migrate_on_start = false;
        }),
    )
    .await;
    let channel = connect(starting.address).await;
    for service in READINESS_SERVICES {
        assert_eq!(check_health(&channel, service).await, ServingStatus::NotServing, "{service}");
    }
    assert_eq!(check_health(&channel, LIVENESS_SERVICE).await, ServingStatus::Serving);
    let raw = RawClient::connect(starting.address).await;
    let rejected = raw.call("/fastzero.auth.v1.AuthService/Login", &[]).await;
    let status = assert_status(rejected, Code::Unavailable, "DATABASE_UNAVAILABLE");
    assert!(status.get_details_retry_info().is_some());
    let rejected = raw.call("/fastzero.auth.v1.AuthService/Nothing", &[]).await;
    assert_status(rejected, Code::Unimplemented, "UNIMPLEMENTED");

    MIGRATIONS.run(&mut database.connect().await).await.expect("migrated");
    wait_until("the schema is noticed", async || {
        check_health(&channel, "").await == ServingStatus::Serving
    })
    .await;
    let listed = Client::new(channel).try_list_todos(ListTodosRequest::default()).await;
    assert_status(listed, Code::Unauthenticated, "NOT_AUTHENTICATED");
}

#[tokio::test]
async fn a_database_without_utf8_encoding_is_rejected() {
    for encoding in ["LATIN1", "SQL_ASCII", "WIN1251", "EUC_JP"] {
        let options = format!("template template0 encoding '{encoding}' locale 'C'");
        let database = TestDatabase::create_empty(&options).await;
        let starting = start(&database, config()).await;
        let ended = with_timeout("the rejection", starting.server_task).await;
        let error = ended.expect("no panic").expect_err("an error").to_string();
        // The error names the fault, and not the failed operation.
        assert!(error.contains(&format!("not {encoding}")), "{encoding}: {error}");
        assert!(error.contains("must be UTF8"), "{encoding}: {error}");
    }
}

#[tokio::test]
async fn a_schema_that_a_newer_binary_migrated_is_accepted() {
    let database = TestDatabase::create().await;
    sqlx::raw_sql(
        "insert into _sqlx_migrations (version, description, success, checksum, execution_time)
         values (9999, 'due dates', true, '\\x00', 0)",
    )
    .execute(&mut database.connect().await)
    .await
    .expect("inserted");
    for migrate_on_start in [true, false] {
        let starting = start(
            &database,
            config_with(|config| {
                config.lifecycle.migrate_on_start = migrate_on_start;
            }),
        )
        .await;
        let channel = connect(starting.address).await;
        wait_until("the server serves", async || {
            check_health(&channel, "").await == ServingStatus::Serving
        })
        .await;
    }
}

/// A migration may take as long as it needs, whatever the timeouts of its role.
#[tokio::test]
async fn a_migration_has_no_timeout() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let mut sql = database.connect().await;
    let name = database.options.get_database().expect("a name");
    let set = "select format('alter database %I set %I = %L', $1, name, '1h') from pg_settings
        where name in ('statement_timeout', 'transaction_timeout')";
    let set: Vec<String> =
        sqlx::query_scalar(set).bind(name).fetch_all(&mut sql).await.expect("statements");
    let record = "create table timeouts (name text, setting text);
        create function record() returns event_trigger language plpgsql as $$ begin
            insert into timeouts select name, setting from pg_settings
            where name in ('statement_timeout', 'transaction_timeout');
        end $$;
        create event trigger record on ddl_command_end execute function record()";
    for statement in set.into_iter().chain([record.to_owned()]) {
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut sql).await.expect("executed");
    }
    let starting = start(&database, config()).await;
    let channel = connect(starting.address).await;
    wait_until("the server serves", async || {
        check_health(&channel, "").await == ServingStatus::Serving
    })
    .await;
    let timeouts = "select distinct name, setting from timeouts where setting <> '0'";
    let timeouts: Vec<(String, String)> =
        sqlx::query_as(timeouts).fetch_all(&mut sql).await.expect("rows");
    assert_eq!(timeouts, []);
    let recorded = sqlx::query_scalar::<_, bool>("select exists (select from timeouts)");
    assert!(recorded.fetch_one(&mut sql).await.expect("a row"), "the migration ran");
}

/// Returns the error with which a starting server ends.
async fn startup_error(database: &TestDatabase, config: Config) -> String {
    let starting = start(database, config).await;
    let ended = with_timeout("the rejection", starting.server_task).await;
    ended.expect("no panic").expect_err("an error").to_string()
}

#[tokio::test]
async fn a_database_with_migrations_of_another_program_is_rejected() {
    let versions = "generate_series(1, 100)";
    // As `sqlx migrate add` numbers them.
    let timestamps = "generate_series(20260101120000, 20260101120002)";
    for series in [versions, timestamps] {
        let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
        let mut sql = database.connect().await;
        let statement = format!(
            "create table _sqlx_migrations (
                 version bigint primary key, description text not null,
                 installed_on timestamptz not null default now(), success boolean not null,
                 checksum bytea not null, execution_time bigint not null
             );
             insert into _sqlx_migrations (version, description, success, checksum, execution_time)
             select version, 'invoices', true, '\\x00', 0 from {series} as version"
        );
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut sql).await.expect("inserted");
        let rows = "select count(*) from _sqlx_migrations";
        let before: i64 = sqlx::query_scalar(rows).fetch_one(&mut sql).await.expect("a row");
        for migrate_on_start in [true, false] {
            let config = config_with(|config| config.lifecycle.migrate_on_start = migrate_on_start);
            let error = startup_error(&database, config).await;
            assert!(error.contains("another program uses this database"), "{error}");
        }
        let after: i64 = sqlx::query_scalar(rows).fetch_one(&mut sql).await.expect("a row");
        assert_eq!(after, before, "{series}");
        let tables = "select to_regclass('users') is null";
        assert!(sqlx::query_scalar::<_, bool>(tables).fetch_one(&mut sql).await.expect("a row"));
    }
}

#[tokio::test]
async fn an_outdated_schema_is_rejected_without_migrations() {
    let database = TestDatabase::create().await;
    sqlx::raw_sql("delete from _sqlx_migrations where version > 1")
        .execute(&mut database.connect().await)
        .await
        .expect("deleted");
    let waiting = config_with(|config| {
        config.lifecycle.migrate_on_start = false;
        config.database.database_wait_seconds = 0;
    });
    let error = startup_error(&database, waiting).await;
    assert!(error.contains("the database schema is outdated"), "{error}");
}

#[tokio::test]
async fn a_table_of_migrations_that_cannot_be_read_is_not_taken_for_an_empty_one() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    sqlx::raw_sql("create table _sqlx_migrations (version text)")
        .execute(&mut database.connect().await)
        .await
        .expect("created");
    let error = startup_error(&database, config()).await;
    assert!(error.contains("\"checksum\" does not exist"), "{error}");
}
