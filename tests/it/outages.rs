//! Trouble with the database: every call ends in time and says what it is.

use std::time::{Duration, Instant};

use fast_zero::proto::{
    auth::v1::LoginRequest,
    todo::v1::{ListTodosRequest, Todo},
};
use sqlx::{AssertSqlSafe, PgConnection};
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

use crate::support::{
    App, Client, PASSWORD,
    app::{config, keyring},
    assert::assert_refused,
    parallel::at_once,
    postgres::TestDatabase,
    proxy::{self, Proxy},
    todos::{titled, without_message},
    wait::{eventually, in_time},
};

/// The deadline of every call, and how much later one may end on a machine that runs all
/// tests at once.
const DEADLINE: Duration = Duration::from_secs(5);
const LATE: Duration = Duration::from_millis(500);

/// How long it may take until an outage is told, or is over, with the same allowance.
const TOLD_AFTER: Duration = Duration::from_millis(2_500);

/// An application that reaches its database by way of a proxy.
async fn behind_a_proxy() -> (App, Proxy) {
    let database = TestDatabase::create().await;
    let address = Proxy::reserve().await;
    let proxy = Proxy::open(address, &database.options).await;
    let way = proxy::through(address, &database.options);
    (App::start_through(database, way, config(), keyring()).await, proxy)
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

/// One call of each kind: what became of it, and after which time.
async fn calls(client: &Client, todo: &Todo) -> Vec<(Result<Response<()>, Status>, Duration)> {
    let (client, id) = (client.clone(), todo.id.clone());
    let changed = Todo { etag: String::new(), ..todo.clone() };
    let login = LoginRequest { login: "ana".into(), password: PASSWORD.into() };
    let calls = (0..40).map(move |number| {
        let (client, id, login) = (client.clone(), id.clone(), login.clone());
        let changed = changed.clone();
        async move {
            let begun = Instant::now();
            let answer = match number % 5 {
                0 => client.try_get_todo(&id).await.map(without_message),
                1 => {
                    let request = ListTodosRequest::default();
                    client.try_list_todos(request).await.map(without_message)
                }
                2 => client.try_create_todo(Some(titled("b"))).await.map(without_message),
                3 => {
                    let mask = Some(&["title"][..]);
                    client.try_update_todo(Some(changed), mask).await.map(without_message)
                }
                _ => client.auth().login(login).await.map(without_message),
            };
            (answer, begun.elapsed())
        }
    });
    at_once(calls).await
}

#[tokio::test]
async fn a_database_that_hangs_holds_no_call_and_is_used_again_when_it_goes_on() {
    let (app, proxy) = behind_a_proxy().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let (mut readiness, mut liveness) = (app.watch("").await, app.watch("liveness").await);
    in_time("SERVING", readiness.until_serving()).await;
    in_time("SERVING", liveness.until_serving()).await;

    proxy.freeze();
    let frozen = Instant::now();
    let told = async {
        in_time("NOT_SERVING", readiness.until_not_serving()).await;
        frozen.elapsed()
    };
    let (answers, told) = tokio::join!(calls(&ana, &todo), told);
    assert!(told < TOLD_AFTER, "{told:?}");
    for (answer, elapsed) in answers {
        let status = answer.expect_err("nothing answers");
        assert!(matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded), "{status:?}");
        assert!(status.get_error_details().error_info().is_some(), "{status:?}");
        assert!(elapsed < DEADLINE + LATE, "{elapsed:?}: {status:?}");
    }

    proxy.thaw();
    let thawed = Instant::now();
    eventually("a call is answered", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
    assert!(thawed.elapsed() < TOLD_AFTER, "{:?}", thawed.elapsed());
    in_time("SERVING", readiness.until_serving()).await;
    for (answer, _) in calls(&ana, &todo).await {
        answer.expect("all is well again");
    }
}

#[tokio::test]
async fn a_database_that_takes_no_connections_is_unavailable_until_it_does() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut admin = Admin::of(&app).await;
    admin.alter("allow_connections false").await;
    for (answer, elapsed) in calls(&ana, &todo).await {
        assert_refused(answer, Code::Unavailable, "DATABASE_UNAVAILABLE");
        assert!(elapsed < DEADLINE + LATE, "{elapsed:?}");
    }
    admin.alter("allow_connections true").await;
    ana.get_todo(&todo.id).await;
}

#[tokio::test]
async fn a_database_that_is_read_only_is_unavailable_for_writing() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut admin = Admin::of(&app).await;
    admin.alter("set default_transaction_read_only = on").await;
    // The connections are gone, which the first calls find out.
    eventually("a read is answered", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
    assert_refused(
        ana.try_create_todo(Some(titled("b"))).await,
        Code::Unavailable,
        "DATABASE_UNAVAILABLE",
    );
    admin.alter("reset default_transaction_read_only").await;
    eventually("a write is answered", async || {
        ana.try_create_todo(Some(titled("b"))).await.is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_database_that_is_full_is_unavailable() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for (code, expected) in [
        // disk_full, out_of_memory, too_many_connections, admin_shutdown, io_error.
        ("53100", "DATABASE_UNAVAILABLE"),
        ("53200", "DATABASE_UNAVAILABLE"),
        ("53300", "DATABASE_UNAVAILABLE"),
        ("57P01", "DATABASE_UNAVAILABLE"),
        ("58030", "DATABASE_UNAVAILABLE"),
    ] {
        let statement = format!(
            "create or replace function refuse() returns trigger language plpgsql as
            $$ begin raise exception 'no' using errcode = '{code}'; end $$;
            create or replace trigger refuse before insert on todos
            for each row execute function refuse()"
        );
        let mut sql = app.sql().await;
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut sql).await.expect("created");
        let refused = ana.try_create_todo(Some(titled("b"))).await;
        assert_refused(refused, Code::Unavailable, expected);
    }
}
