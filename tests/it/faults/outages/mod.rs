//! Outages of the database: every call fails in time and with the right error.

mod busy;
mod idle;
mod probe;
#[cfg(feature = "embedded")]
mod standalone;

use std::{net::SocketAddr, time::Duration};

use fast_zero::proto::todo::v1::Todo;
use sqlx::{AssertSqlSafe, PgConnection};
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

use self::probe::{CallResult, OutageProbe, make_calls};
use crate::support::{
    App, Client,
    app::config,
    assert::{assert_status, assert_unauthenticated},
    health::check_health,
    postgres::TestDatabase,
    proxy::{self, Proxy},
    scheduling_delay::SchedulingDelay,
    todos::todo_titled,
    wait::wait_until,
};

/// The default deadline of a call, and a short one.
const DEADLINE: Duration = Duration::from_secs(5);
const SHORT_DEADLINE: Duration = Duration::from_millis(300);

/// How much later than its deadline a call may end.
const TOLERANCE: Duration = Duration::from_millis(50);

/// The maximum time until readiness reports an outage, until the first call succeeds after
/// the recovery, and until the rate recovers.
const MAX_REPORT_DELAY: Duration = Duration::from_secs(2);
const MAX_RECOVERY_DELAY: Duration = Duration::from_secs(1);
const MAX_RATE_RECOVERY_DELAY: Duration = Duration::from_secs(3);

/// The callers that measure a rate. Each pauses after each call, so that the rate depends less
/// on the load of the machine. Half of the previous rate counts as recovered.
const CALLERS: usize = 8;
const PAUSE: Duration = Duration::from_millis(20);
const RATE_WINDOW: Duration = Duration::from_millis(500);

/// Starts a server that connects to its database through a proxy at this address.
async fn start_behind_proxy(address: SocketAddr) -> (App, Proxy) {
    let database = TestDatabase::create().await;
    let proxy = Proxy::open(address, &database.options).await;
    let options = proxy::options_via(address, &database.options);
    (App::start_via(database, options, config()).await, proxy)
}

#[tokio::test]
async fn a_hanging_database_fails_calls_in_time_and_the_pool_recovers() {
    let (app, proxy) = start_behind_proxy(Proxy::reserve_address().await).await;
    let mut probe = OutageProbe::start(app.address, &app.database.options).await;
    proxy.pause();
    probe.assert_unavailable_during_outage().await;
    proxy.resume();
    probe.assert_recovery().await;
}

#[tokio::test]
async fn the_pool_reconnects_after_an_outage() {
    let address = Proxy::reserve_address().await;
    let (app, proxy) = start_behind_proxy(address).await;
    let mut probe = OutageProbe::start(app.address, &app.database.options).await;
    drop(proxy);
    probe.assert_unavailable_during_outage().await;
    let _proxy = Proxy::open(address, &app.database.options).await;
    probe.assert_recovery().await;
}

/// A session that ended is not active in the cache, even if the response to the deletion is lost.
#[tokio::test]
async fn a_session_whose_deletion_has_no_response_is_not_active() {
    let address = Proxy::reserve_address().await;
    let (app, proxy) = start_behind_proxy(address).await;
    app.execute(
        "create function wait() returns trigger language plpgsql
         as 'begin perform pg_advisory_xact_lock(1); return old; end';
         create trigger wait before delete on sessions for each row execute function wait()",
    )
    .await;
    let ana = app.signed_up("ana").await;
    let used = ana.tokens().refresh_token.clone();
    let successor = ana.refresh(&used).await;
    ana.refresh(&successor.refresh_token).await;
    let mut lock = app.hold_lock("select pg_advisory_xact_lock(1)").await;
    ana.get_user("me").await;

    let reuse = tokio::spawn({
        let ana = ana.clone();
        async move { ana.try_refresh(&used).await }
    });
    lock.wait_until_blocking().await;
    proxy.pause();
    lock.release().await;
    let mut sql = app.connect_database().await;
    wait_until("the session is deleted", async || {
        let deleted = sqlx::query_scalar("select not exists (select from sessions)");
        deleted.fetch_one(&mut sql).await.expect("a row")
    })
    .await;
    drop(proxy);
    let failed = reuse.await.expect("no panic");
    assert_status(failed, Code::Unavailable, "DATABASE_UNAVAILABLE");
    let _proxy = Proxy::open(address, &app.database.options).await;
    assert_unauthenticated(ana.try_get_user("me").await, "SESSION_REVOKED");
}

/// Alters the database of a server, over a connection to another database.
struct Admin {
    name: String,
    sql: PgConnection,
    _other: TestDatabase,
}

impl Admin {
    async fn new(app: &App) -> Self {
        let other = TestDatabase::create().await;
        let name = app.database.options.get_database().expect("a database name").to_owned();
        Self { name, sql: other.connect().await, _other: other }
    }

    /// Alters the database for new connections, and terminates the existing ones.
    async fn alter(&mut self, change: &str) {
        let name = &self.name;
        let statement = format!(
            "alter database {name} {change};
            select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'"
        );
        let done = sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut self.sql).await;
        done.expect("altered");
    }
}

#[tokio::test]
async fn a_database_that_refuses_connections_is_unavailable_until_it_accepts_them() {
    let app = App::start().await;
    let mut probe = OutageProbe::start(app.address, &app.database.options).await;
    let mut admin = Admin::new(&app).await;
    admin.alter("allow_connections false").await;
    probe.assert_unavailable_during_outage().await;
    for CallResult { response, .. } in make_calls(&probe.ana, &probe.todo).await {
        assert_status(response, Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
    admin.alter("allow_connections true").await;
    probe.ana.get_todo(&probe.todo.id).await;
    probe.assert_recovery().await;
}

/// Asserts that only writes fail, and that other calls succeed.
async fn assert_only_writes_fail(ana: &Client, todo: &Todo) {
    let scheduling_delay = SchedulingDelay::measure();
    for CallResult { kind, response, elapsed } in make_calls(ana, todo).await {
        if kind.writes() {
            assert_status(response, Code::Unavailable, "DATABASE_UNAVAILABLE");
        } else {
            response.unwrap_or_else(|status| panic!("{kind:?}: {status:?}"));
        }
        assert!(
            elapsed < DEADLINE + TOLERANCE + scheduling_delay.per_call(),
            "{kind:?}: {elapsed:?}"
        );
    }
}

#[tokio::test]
async fn a_read_only_database_is_unavailable_for_writes() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut admin = Admin::new(&app).await;
    admin.alter("set default_transaction_read_only = on").await;
    // The first calls and health checks notice that the connections are closed.
    wait_until("a read succeeds", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
    wait_until("the service is not ready", async || {
        check_health(&app.channel, "").await == ServingStatus::NotServing
    })
    .await;
    assert_only_writes_fail(&ana, &todo).await;
    assert_eq!(check_health(&app.channel, "").await, ServingStatus::NotServing);
    assert_eq!(check_health(&app.channel, "liveness").await, ServingStatus::Serving);
    admin.alter("reset default_transaction_read_only").await;
    wait_until("a write succeeds", async || {
        ana.try_create_todo(Some(todo_titled("b"))).await.is_ok()
    })
    .await;
    wait_until("the service is ready", async || {
        check_health(&app.channel, "").await == ServingStatus::Serving
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
        assert_only_writes_fail(&ana, &todo).await;
        for service in ["", "liveness"] {
            assert_eq!(check_health(&app.channel, service).await, ServingStatus::Serving);
        }
    }
    app.execute("drop function refuse cascade").await;
    for CallResult { kind, response, .. } in make_calls(&ana, &todo).await {
        response.unwrap_or_else(|status| panic!("{kind:?} after the recovery: {status:?}"));
    }
}

/// As with a `transaction_timeout` of the role, which PostgreSQL 17 introduced.
#[tokio::test]
async fn a_transaction_timeout_of_the_database_ends_a_call_like_its_deadline() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "create function time_out() returns trigger language plpgsql as
         $$ begin raise exception 'timeout' using errcode = '25P04'; end $$;
         create trigger time_out before insert on todos for each row execute function time_out()",
    )
    .await;
    let created = ana.try_create_todo(Some(todo_titled("a"))).await;
    assert_status(created, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
    ana.get_user("me").await;
}

#[tokio::test]
async fn the_session_settings_limit_statements_locks_and_idle_transactions() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    // A trigger runs in the session of the server and reads its settings.
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
