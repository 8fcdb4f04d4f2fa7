//! The first connection to the database: what waiting fixes, and what it does not.

use nix::sys::signal::Signal;
use sqlx::ConnectOptions;

use crate::support::{
    pooler::Pooler,
    postgres::TestDatabase,
    process::Binary,
    proxy::{self, Proxy},
    row_lock::RowLock,
    tls_database::TlsDatabase,
    wait::wait_until,
};

/// Longer than a test waits for an exit.
const LONG_WAIT: &str = "3600";

/// Returns the URL of a database behind a proxy at this address.
fn url_via(address: std::net::SocketAddr, database: &TestDatabase) -> String {
    proxy::options_via(address, &database.options).to_url_lossy().to_string()
}

#[tokio::test]
async fn a_connection_that_waiting_does_not_fix_ends_the_startup_at_once() {
    let database = TestDatabase::create().await;
    let address = Proxy::reserve_address().await;
    let _proxy = Proxy::open(address, &database.options).await;
    let url = url_via(address, &database);
    let (without_query, _) = url.split_once('?').unwrap_or((&url, ""));
    let (server, _) = without_query.rsplit_once('/').expect("a path");
    for (url, expected) in [
        (format!("{server}/missing"), "database \"missing\" does not exist"),
        (format!("{without_query}?sslmode=require"), "set sslmode and sslrootcert in DATABASE_URL"),
    ] {
        for binary in [Binary::server(&url), Binary::new(&["migrate"]).env("DATABASE_URL", &url)] {
            let (code, output) = binary.env("DATABASE_WAIT_SECONDS", LONG_WAIT).output().await;
            assert_eq!(code, Some(1), "{output}");
            assert!(output.contains(expected), "{output}");
            assert!(output.contains(&format!("database at {address}")), "{output}");
        }
    }
}

#[tokio::test]
async fn a_certificate_of_x509_version_1_ends_the_startup_at_once() {
    let server = TlsDatabase::with_version_1_certificate().await;
    // `prefer` is the default.
    for query in ["", "?sslmode=prefer", "?sslmode=require"] {
        let url = format!("postgresql://app@{}/app{query}", server.address);
        let run = Binary::server(&url).env("DATABASE_WAIT_SECONDS", LONG_WAIT);
        let (code, output) = run.output().await;
        assert_eq!(code, Some(1), "{output}");
        for part in [&*server.address.to_string(), "X.509 version 1", "sslmode=disable"] {
            assert!(output.contains(part), "{part} is not in: {output}");
        }
    }
}

#[tokio::test]
async fn a_certificate_that_is_verified_without_the_host_name_is_warned_of() {
    for sslmode in ["require", "verify-ca", "verify-full"] {
        let query = format!("sslmode={sslmode}&sslrootcert=ca.pem");
        let run = Binary::server(&format!("postgresql://app@127.0.0.1:1/app?{query}"));
        let run = run.file("ca.pem", "").env("DATABASE_WAIT_SECONDS", "0");
        let (code, output) = run.output().await;
        assert_eq!(code, Some(1), "{output}");
        let warnings = output.matches("\"database host name not verified\"").count();
        assert_eq!(warnings, usize::from(sslmode != "verify-full"), "{sslmode}: {output}");
    }
}

#[tokio::test]
async fn a_pooler_that_refuses_the_session_of_a_migration_ends_the_startup_at_once() {
    let database = TestDatabase::create().await;
    let address = Proxy::reserve_address().await;
    let _proxy = Proxy::open(address, &database.options).await;
    let pooler = Pooler::start(address).await;
    let url = url_via(pooler.address, &database);
    let server = || Binary::server(&url).env("DATABASE_WAIT_SECONDS", LONG_WAIT);
    let (code, output) = server().output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("run `fast-zero migrate`"), "{output}");
    assert!(output.contains("MIGRATE_ON_START=false"), "{output}");
    assert!(!output.contains("retrying"), "{output}");
    // The service itself works through a pooler.
    server().env("MIGRATE_ON_START", "false").start().address().await;
}

#[tokio::test]
async fn a_database_that_is_not_there_yet_is_waited_for_and_named_once() {
    let database = TestDatabase::create().await;
    let url = url_via(Proxy::reserve_address().await, &database);
    let (code, output) = Binary::server(&url).env("DATABASE_WAIT_SECONDS", "0").output().await;
    assert_eq!(code, Some(1), "{output}");
    let error = output.lines().last().expect("an error");
    assert_eq!(error.matches("Connection refused").count(), 1, "{error}");
}

#[tokio::test]
async fn a_signal_ends_a_migration_that_waits() {
    let database = TestDatabase::create().await;
    let url = url_via(Proxy::reserve_address().await, &database);
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let mut migration = Binary::new(&["migrate"])
            .env("DATABASE_URL", &url)
            .env("DATABASE_WAIT_SECONDS", LONG_WAIT)
            .start();
        migration.wait_for_line("waiting for the database").await;
        migration.signal(signal);
        // By itself, and not by the default action of the signal: PID 1 has none.
        assert_eq!(migration.wait().await.code(), Some(code), "{signal}");
    }
}

#[tokio::test]
async fn a_signal_rolls_back_the_migration_in_progress_and_releases_its_locks() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let url = database.url();
    let migrate = || Binary::new(&["migrate"]).env("DATABASE_URL", &url);
    // The same table in another transaction blocks the migration.
    let mut lock = RowLock::acquire(database.connect().await, "create table users ()").await;
    let mut migration = migrate().start();
    lock.wait_until_blocking().await;
    migration.signal(Signal::SIGTERM);
    assert_eq!(migration.wait().await.code(), Some(143), "{}", migration.output());

    let mut sql = database.connect().await;
    wait_until("the session has ended", async || {
        let ended = "select not exists (select from pg_stat_activity
            where datname = current_database() and wait_event_type = 'Lock')";
        sqlx::query_scalar(ended).fetch_one(&mut sql).await.expect("a row")
    })
    .await;
    drop(lock);
    let applied = "select count(*) from _sqlx_migrations";
    let applied: i64 = sqlx::query_scalar(applied).fetch_one(&mut sql).await.expect("a row");
    assert_eq!(applied, 0);
    let tables = "select to_regclass('todos') is null";
    assert!(sqlx::query_scalar::<_, bool>(tables).fetch_one(&mut sql).await.expect("a row"));
    let (code, output) = migrate().output().await;
    assert_eq!(code, Some(0), "{output}");
}
