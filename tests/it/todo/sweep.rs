//! The sweep of deleted todos, which every replica makes when it starts.

use std::net::SocketAddr;

use tonic::Code;

use crate::support::{
    App,
    assert::assert_status,
    metrics::{Scrape, config_with_metrics},
    wait::wait_until,
};

/// Moves the deletions of todos with this title prefix back, by hours.
async fn age(app: &App, title: &str, hours: i64) {
    let age =
        "update todo_trash set version = version - $2 * 3600000000 where title like $1 || '%'";
    let age = sqlx::query(age).bind(title).bind(hours);
    age.execute(&mut app.connect_database().await).await.expect("aged");
}

async fn count(app: &App, condition: &'static str) -> i64 {
    let statement =
        sqlx::AssertSqlSafe(format!("select count(*) from todo_trash where {condition}"));
    let count = sqlx::query_scalar(statement);
    count.fetch_one(&mut app.connect_database().await).await.expect("a count")
}

#[tokio::test]
async fn content_is_purged_after_30_days_and_tombstones_are_removed_after_31() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut ids = Vec::new();
    for (title, hours) in [("new", 0), ("recent", 719), ("old", 721), ("older", 743), ("gone", 745)]
    {
        let todo = ana.create_todo(title).await;
        ana.delete_todo(&todo.id).await;
        age(&app, title, hours).await;
        ids.push(todo.id);
    }
    // Purged todos have no content, but a tombstone.
    for hours in [743, 745] {
        let todo = ana.create_todo("purged").await;
        ana.delete_todo(&todo.id).await;
        age(&app, "purged", hours).await;
        app.execute(
            "update todo_trash set title = null, title_folded = null, description = null,
                 description_folded = null, state = null
             where title = 'purged'",
        )
        .await;
    }
    let clock = "select version from todo_clocks";
    let before = app.fetch_scalar::<i64>(clock).await;
    let _replica = app.start_replica().await;
    wait_until("the sweep ends", async || {
        count(&app, "true").await == 5 && count(&app, "title is not null").await == 2
    })
    .await;
    let titles: Vec<_> = ana.list_deleted_todos(0).await;
    let titles: Vec<_> = titles.into_iter().filter_map(|it| it.todo).map(|it| it.title).collect();
    assert_eq!(titles, ["new", "recent"]);
    for id in &ids[2..] {
        assert_status(ana.try_undelete_todo(id).await, Code::NotFound, "TODO_NOT_FOUND");
    }
    assert_eq!(app.fetch_scalar::<i64>(clock).await, before, "the sweep moves no clock");
    ana.undelete_todo(&ids[1]).await;
}

/// Creates these users with 2,500 deleted todos each, deleted 30 to 32 days ago. Two triggers record
/// how many rows each statement changes.
async fn create_due_todos(app: &App, usernames: &[&str]) {
    for name in usernames {
        app.signed_up(name).await;
    }
    app.execute(
        "create table batches (operation text, row_count bigint);
         create function record() returns trigger language plpgsql as $$ begin
             insert into batches select tg_op, count(*) from changed;
             return null;
         end $$;
         insert into todo_clocks select id, 1 from users;
         insert into todo_trash
         select users.id, gen_random_uuid(), 'a', 'a', '', '', 1,
             (extract(epoch from now()) * 1000000)::bigint - (720 + n % 48) * 3600000000 - n
         from users, generate_series(1, 2500) as n;
         create trigger record_updates after update on todo_trash
             referencing new table as changed for each statement execute function record();
         create trigger record_deletions after delete on todo_trash
             referencing old table as changed for each statement execute function record();",
    )
    .await;
}

/// Waits until the metrics count these todos, in total.
async fn wait_until_counted(metrics_addresses: &[SocketAddr], purged: u32, removed: u32) {
    wait_until("the metrics count", async || {
        let (mut all_purged, mut all_removed) = (0.0, 0.0);
        for address in metrics_addresses {
            let metrics = Scrape::fetch(*address).await;
            let total = |name: &str| metrics.get(name).unwrap_or_default();
            all_purged += total("fastzero_todos_purged_total");
            all_removed += total("fastzero_tombstones_removed_total");
        }
        let is = |total: f64, expected: u32| (total - f64::from(expected)).abs() < 0.5;
        is(all_purged, purged) && is(all_removed, removed)
    })
    .await;
}

/// Returns the number of todos that are left.
async fn left(app: &App) -> u32 {
    count(app, "true").await.try_into().expect("not negative")
}

#[tokio::test]
async fn a_sweep_has_several_batches() {
    let app = App::start().await;
    create_due_todos(&app, &["ana", "bob"]).await;
    let locked = "select from todo_trash where owner_id = (
            select id from users where username = 'bob'
        ) order by version limit 1 for update";
    // The row that another transaction holds stays, and does not delay the sweep.
    let lock = app.hold_lock(locked).await;
    let replica = app.start_replica_with(config_with_metrics()).await;
    let metrics_address = replica.metrics_address.expect("metrics are enabled");
    wait_until("the sweep ends", async || count(&app, "title is not null").await == 1).await;
    let left = left(&app).await;
    assert!((2_000..3_000).contains(&left), "{left}: half of them are older than 31 days");
    // What is removed at once was purged, too.
    wait_until_counted(&[metrics_address], 4_999, 5_000 - left).await;
    for operation in ["UPDATE", "DELETE"] {
        let largest = "select max(row_count) from batches where operation = $1";
        let largest = sqlx::query_scalar::<_, i64>(largest).bind(operation);
        let largest = largest.fetch_one(&mut app.connect_database().await).await;
        assert_eq!(largest.expect("a number"), 1_000, "{operation}");
    }
    lock.release().await;
    let _next = app.start_replica().await;
    wait_until("the next sweep ends", async || count(&app, "title is not null").await == 0).await;
    let clocks = "select count(*) from todo_clocks where version = 1";
    assert_eq!(app.fetch_scalar::<i64>(clocks).await, 2, "the sweep moves no clock");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_sweep_each_todo_once() {
    let app = App::start().await;
    create_due_todos(&app, &["ana", "bob"]).await;
    // Both sweeps read what is due, and then change rows at the same time.
    let mut lock = app.hold_lock("lock table todo_trash in exclusive mode").await;
    let (first, second) = tokio::join!(
        app.start_replica_with(config_with_metrics()),
        app.start_replica_with(config_with_metrics())
    );
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    wait_until("the sweeps end", async || count(&app, "title is not null").await == 0).await;
    let addresses =
        [&first, &second].map(|replica| replica.metrics_address.expect("metrics are enabled"));
    wait_until_counted(&addresses, 5_000, 5_000 - left(&app).await).await;
}

/// All that is due of the first owner is older than that of the second one.
const ORDER: &str = "update todo_trash set version = version - 86400000000
    where owner_id = (select id from users where username = 'ana')";

const DUE_OF_BOB: &str =
    "title is not null and owner_id = (select id from users where username = 'bob')";

#[tokio::test]
async fn locked_todos_of_an_owner_do_not_stop_the_sweep_of_others() {
    let app = App::start().await;
    create_due_todos(&app, &["ana", "bob"]).await;
    app.execute(ORDER).await;
    let locked = "select from todo_trash where owner_id = (
            select id from users where username = 'ana'
        ) for update";
    let lock = app.hold_lock(locked).await;
    let _replica = app.start_replica().await;
    wait_until("the others are swept", async || count(&app, DUE_OF_BOB).await == 0).await;
    assert_eq!(count(&app, "title is not null").await, 2_500);
    lock.release().await;
}

#[tokio::test]
async fn an_owner_whose_sweep_fails_does_not_stop_the_sweep_of_others() {
    let app = App::start().await;
    create_due_todos(&app, &["ana", "bob"]).await;
    app.execute(ORDER).await;
    app.execute(
        "create function fail() returns trigger language plpgsql as $$ begin
             if old.owner_id = (select id from users where username = 'ana') then
                 raise exception 'broken';
             end if;
             return coalesce(new, old);
         end $$;
         create trigger fail before update or delete on todo_trash
             for each row execute function fail();",
    )
    .await;
    let _replica = app.start_replica().await;
    wait_until("the others are swept", async || count(&app, DUE_OF_BOB).await == 0).await;
    assert_eq!(count(&app, "title is not null").await, 2_500);
}
