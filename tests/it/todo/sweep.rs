//! The sweep of deleted todos, which every replica makes when it starts.

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
    let clock = app.fetch_scalar::<i64>("select version from todo_clocks").await;
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
    ana.undelete_todo(&ids[1]).await;
    let now = app.fetch_scalar::<i64>("select version from todo_clocks").await;
    assert!(now > clock);
}

#[tokio::test]
async fn a_sweep_has_several_batches() {
    let app = App::start().await;
    for name in ["ana", "bob"] {
        app.signed_up(name).await;
    }
    app.execute(
        "insert into todo_clocks select id, 1 from users;
         insert into todo_trash
         select users.id, gen_random_uuid(), 'a', 'a', '', '', 1,
             (extract(epoch from now()) * 1000000)::bigint - (720 + n % 48) * 3600000000 - n
         from users, generate_series(1, 2500) as n;",
    )
    .await;
    let locked = "select from todo_trash where owner_id = (
            select id from users where username = 'bob'
        ) order by version limit 1 for update";
    // The row that another transaction holds stays, and does not delay the sweep.
    let lock = app.hold_lock(locked).await;
    let replica = app.start_replica_with(config_with_metrics()).await;
    let metrics_address = replica.metrics_address.expect("metrics are enabled");
    wait_until("the sweep ends", async || count(&app, "title is not null").await == 1).await;
    let left: u32 = count(&app, "true").await.try_into().expect("not negative");
    wait_until("the metrics count", async || {
        let metrics = Scrape::fetch(metrics_address).await;
        let total = |name: &str| metrics.get(name).unwrap_or_default();
        let (purged, removed) =
            (total("fastzero_todos_purged_total"), total("fastzero_tombstones_removed_total"));
        (purged + removed - 4_999.0).abs() < 0.5
            && (5_000.0 - removed - f64::from(left)).abs() < 0.5
    })
    .await;
    lock.release().await;
    let _next = app.start_replica().await;
    wait_until("the next sweep ends", async || count(&app, "title is not null").await == 0).await;
    let clocks = "select count(*) from todo_clocks where version = 1";
    assert_eq!(app.fetch_scalar::<i64>(clocks).await, 2, "the sweep moves no clock");
}
