//! Cursors of changes, and why they are rejected.

use std::borrow::Cow;

use fast_zero::proto::todo::v1::{SyncTodosRequest, WatchTodosRequest};
use sqlx::migrate::Migrator;
use tonic::{Code, Status};
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::support::{
    App, Client, PASSWORD,
    app::{config, config_with, connect},
    assert::{assert_has_error_details, assert_invalid, assert_status},
    changes::{described, next_message},
    postgres::{MIGRATIONS, TestDatabase},
    process::Binary,
    wait::with_timeout,
};

fn sync_from(cursor: &str) -> SyncTodosRequest {
    SyncTodosRequest { cursor: cursor.to_owned(), page_size: 0 }
}

fn watch_from(cursor: &str) -> WatchTodosRequest {
    WatchTodosRequest { cursor: cursor.to_owned(), from_now: false }
}

/// Returns why a watch at this cursor ends.
async fn watch_failure(client: &Client, cursor: &str) -> Status {
    match client.try_watch_todos(watch_from(cursor)).await {
        Err(status) => status,
        Ok(stream) => {
            let mut stream = stream.into_inner();
            with_timeout("an end", stream.message()).await.expect_err("an error")
        }
    }
}

/// Asserts that both methods reject a cursor as expired.
async fn assert_expired(client: &Client, cursor: &str, cause: Option<&str>) {
    let synced = client.try_sync_todos(sync_from(cursor)).await;
    let synced = assert_status(synced, Code::OutOfRange, "CURSOR_EXPIRED");
    let watched = watch_failure(client, cursor).await;
    assert_eq!(watched.code(), Code::OutOfRange);
    for status in [synced, watched] {
        assert_has_error_details(&status);
        let metadata = &status.get_error_details().error_info().expect("asserted").clone().metadata;
        assert_eq!(metadata["retention_days"], "30");
        assert_eq!(metadata["hint"], "sync again with an empty cursor");
        assert_eq!(metadata.get("cause").map(String::as_str), cause);
    }
}

#[tokio::test]
async fn a_cursor_is_valid_in_both_methods_on_every_replica_and_in_every_session() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("before").await;
    let cursor = ana.cursor().await;
    ana.create_todo("after").await;
    let elsewhere = app.logged_in("ana").await.with_channel(&replica.channel);
    for client in [&ana, &elsewhere] {
        assert_eq!(described(&client.sync_todos(sync_from(&cursor)).await.changes), ["after"]);
        let mut stream = client.watch_todos(watch_from(&cursor)).await;
        let message = next_message(&mut stream).await;
        assert_eq!(described(&message.changes), ["after"]);
        let synced = client.sync_todos(sync_from(&message.cursor)).await;
        assert_eq!((synced.changes.len(), synced.caught_up), (0, true));
    }
}

#[tokio::test]
async fn a_cursor_of_another_user_or_a_forged_one_is_invalid() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    ana.create_todo("a").await;
    let cursor = ana.cursor().await;
    assert_invalid(bob.try_sync_todos(sync_from(&cursor)).await, &["cursor"]);
    assert_eq!(watch_failure(&bob, &cursor).await.code(), Code::InvalidArgument);
    let turned: String = cursor.chars().rev().collect();
    for forged in [
        "x",
        "garbage!",
        "🦀",
        " ",
        &turned,
        &cursor[1..],
        &cursor[..cursor.len() - 1],
        &format!("{cursor}A"),
        &format!("{cursor}="),
        &cursor.replace('A', "B"),
    ] {
        assert_invalid(ana.try_sync_todos(sync_from(forged)).await, &["cursor"]);
        assert_eq!(watch_failure(&ana, forged).await.code(), Code::InvalidArgument, "{forged}");
    }
}

#[tokio::test]
async fn a_cursor_expires_with_the_history_of_the_database() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let cursor = ana.cursor().await;
    app.execute("update database_incarnation set id = gen_random_uuid()").await;
    assert_expired(&ana, &cursor, Some("RESTORED")).await;
    ana.sync_todos(sync_from(&ana.cursor().await)).await;
}

/// As after a failover that has lost the last writes.
#[tokio::test]
async fn a_cursor_ahead_of_the_clock_has_expired() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let cursor = ana.cursor().await;
    app.execute("update todo_clocks set version = version - 1").await;
    assert_expired(&ana, &cursor, Some("FUTURE")).await;
    app.execute("delete from todos; delete from todo_clocks").await;
    assert_expired(&ana, &cursor, Some("FUTURE")).await;
}

/// A clock of the database that a table moves on: the service calls the function without a schema.
const MOVED_CLOCK: &str = "
    create schema moved;
    create table moved.clock (seconds double precision not null);
    insert into moved.clock values (0);
    create function moved.clock_timestamp() returns timestamptz volatile language sql as
        'select pg_catalog.clock_timestamp() + make_interval(secs => seconds) from moved.clock';
    do $$ begin
        execute format(
            'alter database %I set search_path to moved, pg_catalog, public', current_database()
        );
    end $$";

#[tokio::test]
async fn a_cursor_expires_after_thirty_days() {
    const DAY: u32 = 24 * 60 * 60;
    let database = TestDatabase::create().await;
    let mut sql = database.connect().await;
    sqlx::raw_sql(MOVED_CLOCK).execute(&mut sql).await.expect("a clock");
    // Replicas are processes of their own: the IDs of a process never fall back.
    let replica = async || {
        let server = Binary::server(&database.url()).start();
        let client =
            Client::new(connect(server.address().await.parse().expect("an address")).await);
        (server, client)
    };
    let (_server, client) = replica().await;
    let ana = client.signed_up("ana").await;
    let deleted = ana.create_todo("deleted").await;
    let cursor = ana.cursor().await;
    ana.delete_todo(&deleted.id).await;
    ana.create_todo("after").await;
    for (seconds, is_expired) in [(29 * DAY, false), (30 * DAY + 1, true)] {
        let moved = sqlx::query("update moved.clock set seconds = $1").bind(f64::from(seconds));
        moved.execute(&mut sql).await.expect("updated");
        // A replica reads the clock when it starts. The first session has expired, too.
        let (_server, client) = replica().await;
        let ana = client.logged_in("ana", PASSWORD).await.expect("logged in");
        if is_expired {
            assert_expired(&ana, &cursor, None).await;
            ana.sync_todos(sync_from(&ana.cursor().await)).await;
        } else {
            let synced = ana.sync_todos(sync_from(&cursor)).await;
            assert_eq!(described(&synced.changes), ["-deleted", "after"]);
            let mut stream = ana.watch_todos(watch_from(&cursor)).await;
            assert_eq!(next_message(&mut stream).await.changes, synced.changes);
        }
    }
}

#[tokio::test]
async fn a_cursor_under_an_unknown_key_has_expired() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let cursor = ana.cursor().await;
    let other = app.start_replica_with(config_with(|config| {
        config.tokens.secret_key = Some("a key that the first replica does not have".into());
    }));
    let other = other.await;
    let anonymous = Client::new(other.channel.clone());
    let ana = anonymous.logged_in("ana", PASSWORD).await.expect("logged in");
    assert_expired(&ana, &cursor, Some("KEY")).await;
}

/// A watch that is open notices it with the next poll.
#[tokio::test]
async fn an_open_watch_ends_when_the_database_was_restored() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let mut stream = ana.watch_from_now().await;
    app.execute("update database_incarnation set id = gen_random_uuid()").await;
    let ended = with_timeout("an end", stream.message()).await.expect_err("an error");
    assert_eq!(ended.code(), Code::OutOfRange);
    assert_has_error_details(&ended);
}

/// A backup of 0.1.0, which has no cursors. The migration gives each database a history of its own.
#[tokio::test]
async fn after_restore_succeeds_on_a_backup_from_before_cursors() {
    let mut histories = Vec::new();
    for _ in 0..2 {
        let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
        let migrations = Cow::Owned(MIGRATIONS.iter().take(4).cloned().collect());
        let first_release = Migrator { migrations, ..sqlx::migrate!() };
        first_release.run(&mut database.connect().await).await.expect("migrated");
        let binary = Binary::new(&["after-restore"]).env("DATABASE_URL", &database.url());
        let (code, output) = binary.output().await;
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains("migration starts a new history"), "{output}");
        let app = App::start_on(database, config()).await;
        histories.push(app.fetch_scalar::<Uuid>("select id from database_incarnation").await);
    }
    assert_ne!(histories[0], histories[1]);
}

/// Runs the subcommand as an operator does, beside a server.
#[tokio::test]
async fn after_restore_expires_cursors() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    let cursor = ana.cursor().await;
    let binary = Binary::new(&["after-restore"]).env("DATABASE_URL", &app.database.url());
    let (code, output) = binary.output().await;
    assert_eq!(code, Some(0), "{output}");
    assert_expired(&ana, &cursor, Some("RESTORED")).await;
    ana.sync_todos(sync_from(&ana.cursor().await)).await;
}

/// A backup may be older than cursors. Its migration makes an incarnation that no cursor has.
#[tokio::test]
async fn after_restore_leaves_an_older_schema_alone() {
    let database = TestDatabase::create().await;
    let mut connection = database.connect().await;
    let drop = sqlx::raw_sql("drop table database_incarnation").execute(&mut connection).await;
    drop.expect("dropped");
    let binary = Binary::new(&["after-restore"]).env("DATABASE_URL", &database.url());
    let (code, output) = binary.output().await;
    assert_eq!(code, Some(0), "{output}");
    assert!(output.contains("schema older than cursors"), "{output}");
}
