//! Trouble with the database: every call ends in time and says what it is.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::{
    database::{self, Database},
    proto::{
        auth::v1::LoginRequest,
        todo::v1::{GetTodoRequest, ListTodosRequest, Todo},
    },
};
use prost::Message;
use sqlx::{AssertSqlSafe, ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tokio::time::sleep;
use tonic::{Code, Response, Status, transport::Channel};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt;

use crate::{
    health::check,
    support::{
        App, Client, PASSWORD,
        app::{config, connect, keyring},
        assert::assert_refused,
        health::Watch,
        lag::Lag,
        parallel::at_once,
        postgres::TestDatabase,
        proxy::{self, Proxy},
        todos::{titled, without_message},
        wait::{eventually, in_time},
        wire::Wire,
    },
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

/// A service whose database gets into trouble, and somebody who calls it.
struct Trial {
    address: SocketAddr,
    channel: Channel,
    ana: Client,
    todo: Todo,
    readiness: Watch,
    /// Calls that were answered in a window before.
    rate: usize,
    /// The database, past what may be in the way.
    database: PgConnectOptions,
    lag: Lag,
}

impl Trial {
    async fn begin(address: SocketAddr, database: &PgConnectOptions) -> Self {
        let channel = connect(address).await;
        let ana = Client::new(channel.clone()).signed_up("ana").await;
        let todo = ana.create_todo("a").await;
        let mut readiness = Watch::begin(&channel, "").await;
        in_time("SERVING", readiness.until_serving()).await;
        let rate = rate(&ana, &todo).await;
        let (database, lag) = (database.clone(), Lag::measure());
        Self { address, channel, ana, todo, readiness, rate, database, lag }
    }

    /// What holds from the moment on in which nothing of the database answers any more.
    async fn holds_while_it_is_away(&mut self) {
        let begun = Instant::now();
        let told = async {
            in_time("NOT_SERVING", self.readiness.until_not_serving()).await;
            begun.elapsed()
        };
        let (ana, todo) = (&self.ana, &self.todo);
        let (ended, hurried, told) =
            tokio::join!(calls(ana, todo), hurried(self.address, ana, todo), told);
        let late = LATE + self.lag.of_a_call();
        println!("told after {told:.1?}; {late:.1?} may be late");
        assert!(told < TOLD_AFTER + late, "{told:?}");
        for (ended, deadline) in
            ended.into_iter().map(|ended| (ended, DEADLINE)).chain([(hurried, HURRY)])
        {
            let Ended { kind, answer, took } = ended;
            let status = answer.expect_err("nothing answers");
            let in_time = took < deadline + late;
            assert!(in_time, "{kind:?} took {took:?}, {late:?} late at the most: {status:?}");
            assert_unavailable(&status);
        }
        assert_eq!(check(&self.channel, "liveness").await, ServingStatus::Serving);
    }

    /// What holds from the moment on in which all of the database is there again.
    async fn holds_when_it_is_back(&mut self) {
        let begun = Instant::now();
        let (ana, todo) = (&self.ana, &self.todo);
        eventually("a call is answered", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
        let answered = begun.elapsed();
        in_time("SERVING", self.readiness.until_serving()).await;
        let told = begun.elapsed();
        let (mut rates, mut at_full_rate) = (Vec::new(), Duration::MAX);
        eventually("as many calls are answered as before", async || {
            at_full_rate = begun.elapsed();
            rates.push(rate(ana, todo).await);
            2 * rates[rates.len() - 1] > self.rate
        })
        .await;
        let late = LATE + self.lag.of_a_call();
        println!(
            "answered after {answered:.1?}, told after {told:.1?}; rates of {} before, {rates:?} after",
            self.rate,
        );
        assert!(answered < ANSWERED_AFTER + late, "{answered:?}");
        assert!(told < TOLD_AFTER + late, "{told:?}");
        assert!(at_full_rate < AT_FULL_RATE_AFTER + late, "{at_full_rate:?}");
        for Ended { kind, answer, .. } in calls(ana, todo).await {
            answer.unwrap_or_else(|status| panic!("{kind:?}: all is well again, but {status:?}"));
        }
        self.no_transaction_is_open().await;
    }

    /// What was acknowledged is seen by all.
    async fn no_transaction_is_open(&self) {
        let calls = (0..CALLERS).map(|_| {
            let ana = self.ana.clone();
            async move { ana.create_todo("seen by all").await.id }
        });
        let mut ids = at_once(calls).await;
        let mut sql = self.database.connect().await.expect("it answers");
        let seen = "select id::text from todos where title = 'seen by all'";
        let mut seen: Vec<String> =
            sqlx::query_scalar(seen).fetch_all(&mut sql).await.expect("read");
        ids.sort();
        seen.sort();
        assert_eq!(seen, ids);
        let open = "select count(*) from pg_stat_activity
            where datname = current_database() and state like 'idle in transaction%'";
        let open: i64 = sqlx::query_scalar(open).fetch_one(&mut sql).await.expect("counted");
        assert_eq!(open, 0);
    }
}

/// How many calls are answered in a window of time.
async fn rate(client: &Client, todo: &Todo) -> usize {
    let end = Instant::now() + RATE_WINDOW;
    let callers = (0..CALLERS).map(|_| {
        let (client, id) = (client.clone(), todo.id.clone());
        async move {
            let mut answered = 0;
            while Instant::now() < end {
                answered += usize::from(client.try_get_todo(&id).await.is_ok());
                sleep(PAUSE).await;
            }
            answered
        }
    });
    at_once(callers).await.into_iter().sum()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Get,
    List,
    Create,
    Update,
    LogIn,
}

impl Kind {
    fn writes(self) -> bool {
        !matches!(self, Self::Get | Self::List)
    }
}

/// What became of a call, and after which time.
struct Ended {
    kind: Kind,
    answer: Result<Response<()>, Status>,
    took: Duration,
}

/// Calls of each kind, all at once.
async fn calls(client: &Client, todo: &Todo) -> Vec<Ended> {
    let kinds = [Kind::Get, Kind::List, Kind::Create, Kind::Update];
    // Of those that hash a password fewer: on a machine that has much else to do, many would
    // take longer than their deadline whatever the database does.
    let kinds = kinds.into_iter().cycle().take(38).chain([Kind::LogIn; 2]);
    let calls = kinds.map(|kind| {
        let (client, id) = (client.clone(), todo.id.clone());
        let changed = Todo { etag: String::new(), ..todo.clone() };
        async move {
            let begun = Instant::now();
            let answer = match kind {
                Kind::Get => client.try_get_todo(&id).await.map(without_message),
                Kind::List => {
                    let request = ListTodosRequest::default();
                    client.try_list_todos(request).await.map(without_message)
                }
                Kind::Create => {
                    client.try_create_todo(Some(titled("b"))).await.map(without_message)
                }
                Kind::Update => {
                    let mask = Some(&["title"][..]);
                    client.try_update_todo(Some(changed), mask).await.map(without_message)
                }
                Kind::LogIn => {
                    let login = LoginRequest { login: "ana".into(), password: PASSWORD.into() };
                    client.auth().login(login).await.map(without_message)
                }
            };
            Ended { kind, answer, took: begun.elapsed() }
        }
    });
    at_once(calls).await
}

/// A call with a deadline of its own, of which only the server knows.
async fn hurried(address: SocketAddr, client: &Client, todo: &Todo) -> Ended {
    let wire = Wire::connect(address).await.with_token_of(client);
    let wire = wire.with("grpc-timeout", format!("{}m", HURRY.as_millis()));
    let request = GetTodoRequest { id: todo.id.clone() }.encode_to_vec();
    let begun = Instant::now();
    let answer = wire.call("/fastzero.todo.v1.TodoService/GetTodo", &request).await;
    Ended { kind: Kind::Get, answer: answer.map(without_message), took: begun.elapsed() }
}

#[track_caller]
fn assert_unavailable(status: &Status) {
    assert!(matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded), "{status:?}");
    assert!(status.get_error_details().error_info().is_some(), "{status:?}");
}

/// An application that reaches its database by way of a proxy at this address.
async fn behind_a_proxy(address: SocketAddr) -> (App, Proxy) {
    let database = TestDatabase::create().await;
    let proxy = Proxy::open(address, &database.options).await;
    let way = proxy::through(address, &database.options);
    (App::start_through(database, way, config(), keyring()).await, proxy)
}

#[tokio::test]
async fn a_database_that_hangs_holds_no_call_and_is_used_again_when_it_goes_on() {
    let (app, proxy) = behind_a_proxy(Proxy::reserve().await).await;
    let mut trial = Trial::begin(app.address, &app.database.options).await;
    proxy.freeze();
    trial.holds_while_it_is_away().await;
    proxy.thaw();
    trial.holds_when_it_is_back().await;
}

#[tokio::test]
async fn a_database_that_is_away_is_used_again_when_it_is_back() {
    let address = Proxy::reserve().await;
    let (app, proxy) = behind_a_proxy(address).await;
    let mut trial = Trial::begin(app.address, &app.database.options).await;
    drop(proxy);
    trial.holds_while_it_is_away().await;
    let _proxy = Proxy::open(address, &app.database.options).await;
    trial.holds_when_it_is_back().await;
}

/// The real binary, on a PostgreSQL of its own.
#[cfg(feature = "embedded")]
mod alone {
    use sqlx::Connection;

    use super::*;
    use crate::support::{
        embedded::{Postgres, place},
        process::{Process, Run},
    };

    async fn begin(postgres: &Postgres) -> (Process, Trial) {
        let server = Run::server(&postgres.url).start();
        let address = server.address().await.parse().expect("an address");
        let trial = Trial::begin(address, &postgres.options()).await;
        (server, trial)
    }

    #[tokio::test]
    async fn a_postgresql_that_is_stopped_holds_no_call() {
        let postgres = Postgres::temporary();
        let (server, mut trial) = begin(&postgres).await;
        let frozen = postgres.freeze().await;
        trial.holds_while_it_is_away().await;
        drop(frozen);
        trial.holds_when_it_is_back().await;
        assert!(!server.output().contains("internal error"), "{}", server.output());
    }

    #[tokio::test]
    async fn a_postgresql_without_a_connection_to_give_is_away() {
        let place = place();
        let postgres = Postgres::start(&place.path().join("data"));
        let (server, mut trial) = begin(&postgres).await;
        let mut taken = vec![postgres.connect().await];
        take_all(&postgres, &mut taken).await;
        while end_those_of_the_service(&mut taken[0]).await {
            take_all(&postgres, &mut taken).await;
        }
        trial.holds_while_it_is_away().await;
        assert!(server.output().contains("too many clients"), "{}", server.output());
        for connection in taken {
            connection.close().await.expect("closed");
        }
        trial.holds_when_it_is_back().await;
        assert!(!server.output().contains("internal error"), "{}", server.output());
    }

    /// Takes connections until there are none.
    async fn take_all(postgres: &Postgres, taken: &mut Vec<PgConnection>) {
        const TOO_MANY_CONNECTIONS: &str = "53300";
        let refused = loop {
            match PgConnection::connect_with(&postgres.options()).await {
                Ok(connection) => taken.push(connection),
                Err(refused) => break refused,
            }
        };
        let refused = refused.into_database_error().expect("PostgreSQL says so");
        assert_eq!(refused.code().as_deref(), Some(TOO_MANY_CONNECTIONS), "{refused}");
    }

    /// Whether there were any.
    async fn end_those_of_the_service(sql: &mut PgConnection) -> bool {
        let end = "select count(pg_terminate_backend(pid, 1000)) from pg_stat_activity
            where application_name = 'fast-zero'";
        let ended: i64 = sqlx::query_scalar(end).fetch_one(sql).await.expect("ended");
        ended > 0
    }
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
async fn a_database_that_takes_no_connections_is_unavailable_until_it_does() {
    let app = App::start().await;
    let mut trial = Trial::begin(app.address, &app.database.options).await;
    let mut admin = Admin::of(&app).await;
    admin.alter("allow_connections false").await;
    trial.holds_while_it_is_away().await;
    for Ended { answer, .. } in calls(&trial.ana, &trial.todo).await {
        assert_refused(answer, Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
    admin.alter("allow_connections true").await;
    trial.ana.get_todo(&trial.todo.id).await;
    trial.holds_when_it_is_back().await;
}

/// Where only writing is impossible, the rest goes on, and the service is ready.
async fn assert_reads_only(app: &App, ana: &Client, todo: &Todo) {
    let lag = Lag::measure();
    for Ended { kind, answer, took } in calls(ana, todo).await {
        if kind.writes() {
            assert_refused(answer, Code::Unavailable, "DATABASE_UNAVAILABLE");
        } else {
            answer.unwrap_or_else(|status| panic!("{kind:?}: {status:?}"));
        }
        assert!(took < DEADLINE + LATE + lag.of_a_call(), "{kind:?}: {took:?}");
    }
    for service in ["", "liveness"] {
        assert_eq!(check(&app.channel, service).await, ServingStatus::Serving);
    }
}

#[tokio::test]
async fn a_database_that_is_read_only_is_unavailable_for_writing() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let mut admin = Admin::of(&app).await;
    admin.alter("set default_transaction_read_only = on").await;
    // The connections are gone, which the first calls and looks find out.
    eventually("a read is answered", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
    eventually("it is ready", async || check(&app.channel, "").await == ServingStatus::Serving)
        .await;
    assert_reads_only(&app, &ana, &todo).await;
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
        let mut sql = app.sql().await;
        sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut sql).await.expect("created");
        assert_reads_only(&app, &ana, &todo).await;
    }
    app.execute("drop function refuse cascade").await;
    for Ended { kind, answer, .. } in calls(&ana, &todo).await {
        answer.unwrap_or_else(|status| panic!("{kind:?}: there is room again, but {status:?}"));
    }
}

#[tokio::test]
async fn the_database_itself_ends_what_takes_too_long() {
    let database = TestDatabase::create().await;
    let options = database::parse_url(&database.url()).expect("a good URL");
    let service = Database::new(options, 1).expect("a pool");
    let settings = service.run(async |connection| {
        let settings = "select name || ' ' || setting from pg_settings
            where name like '%_timeout' and source = 'session' order by name";
        Ok(sqlx::query_scalar::<_, String>(settings).fetch_all(connection).await?)
    });
    let expected = [
        "idle_in_transaction_session_timeout 10000",
        "lock_timeout 5000",
        "statement_timeout 10000",
    ];
    assert_eq!(settings.await.expect("asked"), expected);
}
