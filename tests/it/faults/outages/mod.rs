//! Trouble with the database: every call ends in time and says what it is.

#[cfg(feature = "embedded")]
mod standalone;
mod trial;

use std::{net::SocketAddr, time::Duration};

use fast_zero::proto::todo::v1::Todo;
use sqlx::{AssertSqlSafe, PgConnection};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use self::trial::{Ended, Trial, calls};
use crate::support::{
    App, Client,
    app::config,
    assert::assert_status,
    health::check_health,
    postgres::TestDatabase,
    proxy::{self, Proxy},
    scheduling_delay::SchedulingDelay,
    todos::todo_titled,
    wait::wait_until,
};

/// The deadline of a call that asks for none, and that of one that is in a hurry.
const DEADLINE: Duration = Duration::from_secs(5);
const HURRY: Duration = Duration::from_millis(300);

/// How much later a call may end.
const LATE: Duration = Duration::from_millis(50);

/// How long it may take until an outage is told, until a call is answered when it is over,
/// and until as many are as before.
const TOLD_AFTER: Duration = Duration::from_secs(2);
const ANSWERED_AFTER: Duration = Duration::from_secs(1);
const AT_FULL_RATE_AFTER: Duration = Duration::from_secs(3);

/// The callers that measure a rate, each with a pause after each call, so that it depends
/// less on what else the machine does. Half of what it was is as good as all of it.
const CALLERS: usize = 8;
const PAUSE: Duration = Duration::from_millis(20);
const RATE_WINDOW: Duration = Duration::from_millis(500);

/// An application that reaches its database by way of a proxy at this address.
async fn behind_a_proxy(address: SocketAddr) -> (App, Proxy) {
    let database = TestDatabase::create().await;
    let proxy = Proxy::open(address, &database.options).await;
    let way = proxy::options_via(address, &database.options);
    (App::start_via(database, way, config()).await, proxy)
}

#[tokio::test]
async fn a_hanging_database_fails_calls_in_time_and_the_pool_recovers() {
    let (app, proxy) = behind_a_proxy(Proxy::reserve_address().await).await;
    let mut trial = Trial::begin(app.address, &app.database.options).await;
    proxy.pause();
    trial.holds_while_it_is_away().await;
    proxy.resume();
    trial.holds_when_it_is_back().await;
}

#[tokio::test]
async fn the_pool_reconnects_after_an_outage() {
    let address = Proxy::reserve_address().await;
    let (app, proxy) = behind_a_proxy(address).await;
    let mut trial = Trial::begin(app.address, &app.database.options).await;
    drop(proxy);
    trial.holds_while_it_is_away().await;
    let _proxy = Proxy::open(address, &app.database.options).await;
    trial.holds_when_it_is_back().await;
}

/// Changes an application's database from beside it.
struct Admin {
    name: String,
    sql: PgConnection,
    _beside: TestDatabase,
}

impl Admin {
    async fn of(app: &App) -> Self {
        let beside = TestDatabase::create().await;
        let name = app.database.options.get_database().expect("it has a name").to_owned();
        Self { name, sql: beside.connect().await, _beside: beside }
    }

    /// Changes the database for new connections, and ends those there are.
    async fn alter(&mut self, change: &str) {
        let name = &self.name;
        let statement = format!(
            "alter database {name} {change};
            select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
        );
        let done = sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut self.sql).await;
        done.expect("it works");
    }
}

#[tokio::test]
async fn a_database_that_refuses_connections_is_unavailable_until_it_accepts_them() {
    let app = App::start().await;
    let mut trial = Trial::begin(app.address, &app.database.options).await;
    let mut admin = Admin::of(&app).await;
    admin.alter("allow_connections false").await;
    trial.holds_while_it_is_away().await;
    for Ended { answer, .. } in calls(&trial.ana, &trial.todo).await {
        assert_status(answer, Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
    admin.alter("allow_connections true").await;
    trial.ana.get_todo(&trial.todo.id).await;
    trial.holds_when_it_is_back().await;
}

/// Where only writing is impossible, the rest goes on, and the service is ready.
async fn assert_reads_only(app: &App, ana: &Client, todo: &Todo) {
    let lag = SchedulingDelay::measure();
    for Ended { kind, answer, took } in calls(ana, todo).await {
        if kind.writes() {
            assert_status(answer, Code::Unavailable, "DATABASE_UNAVAILABLE");
        } else {
            answer.unwrap_or_else(|status| panic!("{kind:?}: {status:?}"));
        }
        assert!(took < DEADLINE + LATE + lag.per_call(), "{kind:?}: {took:?}");
    }
    for service in ["", "liveness"] {
        assert_eq!(check_health(&app.channel, service).await, ServingStatus::Serving);
    }
}

#[tokio::test]
async fn a_read_only_database_is_unavailable_for_writes() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut admin = Admin::of(&app).await;
    admin.alter("set default_transaction_read_only = on").await;
    // The connections are gone, which the first calls and looks find out.
    wait_until("a read is answered", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
    wait_until("it is ready", async || {
        check_health(&app.channel, "").await == ServingStatus::Serving
    })
    .await;
    assert_reads_only(&app, &ana, &todo).await;
    admin.alter("reset default_transaction_read_only").await;
    wait_until("a write is answered", async || {
        ana.try_create_todo(Some(todo_titled("b"))).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_full_database_is_unavailable_for_writes() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    // disk_full, out_of_memory, too_many_connections, admin_shutdown, io_error.
    for code in ["53100", "53200", "53300", "57P01", "58030"] {
        let statement = format!(
            "create or replace function refuse() returns trigger language plpgsql as
            $$ begin raise exception 'no' using errcode = '{code}'; end $$;
            create or replace trigger refuse before insert or update on todos
            for each row execute function refuse();
            create or replace trigger refuse before insert or update on sessions
            for each row execute function refuse()"
        );
        let mut sql = app.connect_database().await;
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut sql).await.expect("created");
        assert_reads_only(&app, &ana, &todo).await;
    }
    app.execute("drop function refuse cascade").await;
    for Ended { kind, answer, .. } in calls(&ana, &todo).await {
        answer.unwrap_or_else(|status| panic!("{kind:?}: there is room again, but {status:?}"));
    }
}

#[tokio::test]
async fn the_session_settings_limit_statements_locks_and_idle_transactions() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    // A trigger runs in the session of the server, and sees its settings.
    let mut sql = app.connect_database().await;
    let record = "create table settings (setting text);
        create function record() returns trigger language plpgsql as $$ begin
            insert into settings select name || ' ' || setting from pg_settings
            where name like '%_timeout' and source = 'session';
            return new;
        end $$;
        create trigger record before insert on todos for each row execute function record()";
    sqlx::raw_sql(AssertSqlSafe(record)).execute(&mut sql).await.expect("created");
    ana.create_todo("a todo").await;
    let settings = sqlx::query_scalar::<_, String>("select setting from settings order by setting");
    let expected = [
        "idle_in_transaction_session_timeout 10000",
        "lock_timeout 5000",
        "statement_timeout 10000",
    ];
    assert_eq!(settings.fetch_all(&mut sql).await.expect("recorded"), expected);
}
