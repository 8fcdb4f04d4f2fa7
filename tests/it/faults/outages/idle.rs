//! Connections that break while no call uses them.

use std::time::{Duration, Instant};

use sqlx::AssertSqlSafe;

use super::{TOLERANCE, start_behind_proxy};
use crate::support::{
    App, app::config, parallel::join_all, postgres::TestDatabase, proxy::Proxy,
    scheduling_delay::SchedulingDelay, wait::wait_until,
};

/// How long a broken connection delays a call, and how long a new one takes to open.
const MAX_DELAY: Duration = Duration::from_millis(1_000 + 500);

/// Waits until no session of the server has been active for long enough to be pinged before its
/// next use, and returns the number of sessions.
async fn wait_until_idle(app: &App) {
    let mut sql = app.connect_database().await;
    wait_until("all connections are idle", async || {
        let idle = sqlx::query_scalar(
            "select not exists (
                 select from pg_stat_activity
                 where datname = current_database() and pid <> pg_backend_pid()
                     and state_change > clock_timestamp() - interval '120 milliseconds'
             )",
        );
        idle.fetch_one(&mut sql).await.expect("a row")
    })
    .await;
}

#[tokio::test]
async fn connections_that_the_server_closed_fail_no_call() {
    let database = TestDatabase::create().await;
    let name = database.options.get_database().expect("a database name");
    // Less than the interval of the health check, which would keep its sessions open.
    let limit = format!("alter database {name} set idle_session_timeout = '400ms'");
    let mut sql = database.connect().await;
    sqlx::raw_sql(AssertSqlSafe(limit)).execute(&mut sql).await.expect("altered");
    let options = database.options.clone();
    let app = App::start_via(database, options, config()).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    for _ in 0..3 {
        let sessions: Vec<i32> = sqlx::query_scalar(
            "select pid from pg_stat_activity
             where datname = current_database() and application_name = 'fast-zero'",
        )
        .fetch_all(&mut sql)
        .await
        .expect("rows");
        wait_until("the server has closed the sessions", async || {
            let open = sqlx::query_scalar(
                "select exists (select from pg_stat_activity where pid = any($1))",
            );
            let open: bool = open.bind(&sessions).fetch_one(&mut sql).await.expect("a row");
            !open
        })
        .await;
        ana.get_todo(&todo.id).await;
    }
}

#[tokio::test]
async fn a_silent_connection_delays_one_call_by_a_second() {
    let (app, proxy) = start_behind_proxy(Proxy::reserve_address().await).await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    wait_until_idle(&app).await;
    let scheduling_delay = SchedulingDelay::measure();
    proxy.pause_open_connections();
    let calls = (0..2 * config().limits.database_max_connections).map(|_| {
        let (ana, id) = (ana.clone(), todo.id.clone());
        async move {
            let started = Instant::now();
            ana.get_todo(&id).await;
            started.elapsed()
        }
    });
    let elapsed = join_all(calls).await;
    let tolerance = TOLERANCE + scheduling_delay.per_call();
    assert!(elapsed.iter().all(|elapsed| *elapsed < MAX_DELAY + tolerance), "{elapsed:?}");
    // The others are closed, not tried one by one.
    let started = Instant::now();
    for _ in 0..config().limits.database_max_connections {
        ana.get_todo(&todo.id).await;
    }
    let elapsed = started.elapsed();
    assert!(elapsed < MAX_DELAY, "{elapsed:?}");
}
