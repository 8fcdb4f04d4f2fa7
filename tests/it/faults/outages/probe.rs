//! Clients that measure the service during and after an outage.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use fast_zero::proto::{
    auth::v1::LoginRequest,
    todo::v1::{GetTodoRequest, ListTodosRequest, Todo},
};
use prost::Message;
use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use tokio::time::sleep;
use tonic::{Code, Response, Status, transport::Channel};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_types::StatusExt;

use super::{
    ANSWERED_AFTER, AT_FULL_RATE_AFTER, CALLERS, DEADLINE, HURRY, LATE, PAUSE, RATE_WINDOW,
    TOLD_AFTER,
};
use crate::support::{
    Client, PASSWORD,
    app::connect,
    health::{Watch, check_health},
    parallel::join_all,
    raw_client::RawClient,
    scheduling_delay::SchedulingDelay,
    todos::{discard_message, todo_titled},
    wait::{wait_until, with_timeout},
};

/// A service whose database gets into trouble, and somebody who calls it.
pub(super) struct Trial {
    pub(super) address: SocketAddr,
    pub(super) channel: Channel,
    pub(super) ana: Client,
    pub(super) todo: Todo,
    pub(super) readiness: Watch,
    /// Calls that were answered in a window before.
    pub(super) rate: usize,
    /// The database, past what may be in the way.
    pub(super) database: PgConnectOptions,
    pub(super) lag: SchedulingDelay,
}

impl Trial {
    pub(super) async fn begin(address: SocketAddr, database: &PgConnectOptions) -> Self {
        let channel = connect(address).await;
        let ana = Client::new(channel.clone()).signed_up("ana").await;
        let todo = ana.create_todo("a").await;
        let mut readiness = Watch::start(&channel, "").await;
        with_timeout("SERVING", readiness.wait_until_serving()).await;
        let rate = rate(&ana, &todo).await;
        let (database, lag) = (database.clone(), SchedulingDelay::measure());
        Self { address, channel, ana, todo, readiness, rate, database, lag }
    }

    /// What holds from the moment on in which nothing of the database answers any more.
    pub(super) async fn holds_while_it_is_away(&mut self) {
        let begun = Instant::now();
        let told = async {
            with_timeout("NOT_SERVING", self.readiness.wait_until_not_serving()).await;
            begun.elapsed()
        };
        let (ana, todo) = (&self.ana, &self.todo);
        let (ended, hurried, told) =
            tokio::join!(calls(ana, todo), hurried(self.address, ana, todo), told);
        let late = LATE + self.lag.per_call();
        println!("told after {told:.1?}; {late:.1?} may be late");
        assert!(told < TOLD_AFTER + late, "{told:?}");
        for (ended, deadline) in
            ended.into_iter().map(|ended| (ended, DEADLINE)).chain([(hurried, HURRY)])
        {
            let Ended { kind, answer, took } = ended;
            let status = answer.expect_err("nothing answers");
            let with_timeout = took < deadline + late;
            assert!(with_timeout, "{kind:?} took {took:?}, {late:?} late at the most: {status:?}");
            assert_unavailable(&status);
        }
        assert_eq!(check_health(&self.channel, "liveness").await, ServingStatus::Serving);
    }

    /// What holds from the moment on in which all of the database is there again.
    pub(super) async fn holds_when_it_is_back(&mut self) {
        let begun = Instant::now();
        let (ana, todo) = (&self.ana, &self.todo);
        wait_until("a call is answered", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
        let answered = begun.elapsed();
        with_timeout("SERVING", self.readiness.wait_until_serving()).await;
        let told = begun.elapsed();
        let (mut rates, mut at_full_rate) = (Vec::new(), Duration::MAX);
        wait_until("as many calls are answered as before", async || {
            at_full_rate = begun.elapsed();
            rates.push(rate(ana, todo).await);
            2 * rates[rates.len() - 1] > self.rate
        })
        .await;
        let late = LATE + self.lag.per_call();
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
    pub(super) async fn no_transaction_is_open(&self) {
        let calls = (0..CALLERS).map(|_| {
            let ana = self.ana.clone();
            async move { ana.create_todo("seen by all").await.id }
        });
        let mut ids = join_all(calls).await;
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
pub(super) async fn rate(client: &Client, todo: &Todo) -> usize {
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
    join_all(callers).await.into_iter().sum()
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    Get,
    List,
    Create,
    Update,
    LogIn,
}

impl Kind {
    pub(super) fn writes(self) -> bool {
        !matches!(self, Self::Get | Self::List)
    }
}

/// What became of a call, and after which time.
pub(super) struct Ended {
    pub(super) kind: Kind,
    pub(super) answer: Result<Response<()>, Status>,
    pub(super) took: Duration,
}

/// Calls of each kind, all at once.
pub(super) async fn calls(client: &Client, todo: &Todo) -> Vec<Ended> {
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
                Kind::Get => client.try_get_todo(&id).await.map(discard_message),
                Kind::List => {
                    let request = ListTodosRequest::default();
                    client.try_list_todos(request).await.map(discard_message)
                }
                Kind::Create => {
                    client.try_create_todo(Some(todo_titled("b"))).await.map(discard_message)
                }
                Kind::Update => {
                    let mask = Some(&["title"][..]);
                    client.try_update_todo(Some(changed), mask).await.map(discard_message)
                }
                Kind::LogIn => {
                    let login = LoginRequest { login: "ana".into(), password: PASSWORD.into() };
                    client.auth().login(login).await.map(discard_message)
                }
            };
            Ended { kind, answer, took: begun.elapsed() }
        }
    });
    join_all(calls).await
}

/// A call with a deadline of its own, of which only the server knows.
pub(super) async fn hurried(address: SocketAddr, client: &Client, todo: &Todo) -> Ended {
    let wire = RawClient::connect(address).await.with_token_of(client);
    let wire = wire.with_metadata("grpc-timeout", format!("{}m", HURRY.as_millis()));
    let request = GetTodoRequest { id: todo.id.clone() }.encode_to_vec();
    let begun = Instant::now();
    let answer = wire.call("/fastzero.todo.v1.TodoService/GetTodo", &request).await;
    Ended { kind: Kind::Get, answer: answer.map(discard_message), took: begun.elapsed() }
}

#[track_caller]
pub(super) fn assert_unavailable(status: &Status) {
    assert!(matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded), "{status:?}");
    assert!(status.get_error_details().error_info().is_some(), "{status:?}");
}
