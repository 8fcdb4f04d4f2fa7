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
    CALLERS, DEADLINE, MAX_RATE_RECOVERY_DELAY, MAX_RECOVERY_DELAY, MAX_REPORT_DELAY, PAUSE,
    RATE_WINDOW, SHORT_DEADLINE, TOLERANCE,
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

/// A client that calls the service before, during and after an outage of the database.
pub(super) struct OutageProbe {
    pub(super) address: SocketAddr,
    pub(super) channel: Channel,
    pub(super) ana: Client,
    pub(super) todo: Todo,
    pub(super) readiness: Watch,
    /// The number of successful calls in a window before the outage.
    pub(super) rate: usize,
    /// The options of a direct connection to the database, not through the proxy.
    pub(super) database: PgConnectOptions,
    pub(super) scheduling_delay: SchedulingDelay,
}

impl OutageProbe {
    pub(super) async fn start(address: SocketAddr, database: &PgConnectOptions) -> Self {
        let channel = connect(address).await;
        let ana = Client::new(channel.clone()).signed_up("ana").await;
        let todo = ana.create_todo("a").await;
        let mut readiness = Watch::start(&channel, "").await;
        with_timeout("SERVING", readiness.wait_until_serving()).await;
        let rate = rate(&ana, &todo).await;
        let (database, scheduling_delay) = (database.clone(), SchedulingDelay::measure());
        Self { address, channel, ana, todo, readiness, rate, database, scheduling_delay }
    }

    /// Asserts that every call fails in time and that readiness follows. The outage must start
    /// right before.
    pub(super) async fn assert_unavailable_during_outage(&mut self) {
        let started = Instant::now();
        let reported = async {
            with_timeout("NOT_SERVING", self.readiness.wait_until_not_serving()).await;
            started.elapsed()
        };
        let (ana, todo) = (&self.ana, &self.todo);
        let (results, short, reported) = tokio::join!(
            make_calls(ana, todo),
            call_with_short_deadline(self.address, ana, todo),
            reported
        );
        let tolerance = TOLERANCE + self.scheduling_delay.per_call();
        println!("reported after {reported:.1?}, tolerance {tolerance:.1?}");
        assert!(reported < MAX_REPORT_DELAY + tolerance, "{reported:?}");
        let results = results.into_iter().map(|result| (result, DEADLINE));
        for (result, deadline) in results.chain([(short, SHORT_DEADLINE)]) {
            let CallResult { kind, response, elapsed } = result;
            let status = response.expect_err("an outage");
            let in_time = elapsed < deadline + tolerance;
            assert!(in_time, "{kind:?} took {elapsed:?}, tolerance {tolerance:?}: {status:?}");
            assert_unavailable(&status);
        }
        assert_eq!(check_health(&self.channel, "liveness").await, ServingStatus::Serving);
    }

    /// Asserts that calls, readiness and the rate recover in time. The outage must end right
    /// before.
    pub(super) async fn assert_recovery(&mut self) {
        let started = Instant::now();
        let (ana, todo) = (&self.ana, &self.todo);
        wait_until("a call succeeds", async || ana.try_get_todo(&todo.id).await.is_ok()).await;
        let recovered = started.elapsed();
        with_timeout("SERVING", self.readiness.wait_until_serving()).await;
        let reported = started.elapsed();
        let (mut rates, mut at_full_rate) = (Vec::new(), Duration::MAX);
        wait_until("the rate recovers", async || {
            at_full_rate = started.elapsed();
            rates.push(rate(ana, todo).await);
            2 * rates[rates.len() - 1] > self.rate
        })
        .await;
        let tolerance = TOLERANCE + self.scheduling_delay.per_call();
        println!(
            "first call after {recovered:.1?}, reported after {reported:.1?}; rates: {} before, \
             {rates:?} after",
            self.rate,
        );
        assert!(recovered < MAX_RECOVERY_DELAY + tolerance, "{recovered:?}");
        assert!(reported < MAX_REPORT_DELAY + tolerance, "{reported:?}");
        assert!(at_full_rate < MAX_RATE_RECOVERY_DELAY + tolerance, "{at_full_rate:?}");
        for CallResult { kind, response, .. } in make_calls(ana, todo).await {
            response.unwrap_or_else(|status| panic!("{kind:?} after the recovery: {status:?}"));
        }
        self.assert_writes_are_committed().await;
    }

    /// Asserts that acknowledged writes are visible to other connections.
    pub(super) async fn assert_writes_are_committed(&self) {
        let calls = (0..CALLERS).map(|_| {
            let ana = self.ana.clone();
            async move { ana.create_todo("committed").await.id }
        });
        let mut ids = join_all(calls).await;
        let mut sql = self.database.connect().await.expect("the database accepts connections");
        let visible = "select id::text from todos where title = 'committed'";
        let mut visible: Vec<String> =
            sqlx::query_scalar(visible).fetch_all(&mut sql).await.expect("read");
        ids.sort();
        visible.sort();
        assert_eq!(visible, ids);
        let open = "select count(*) from pg_stat_activity
            where datname = current_database() and state like 'idle in transaction%'";
        let open: i64 = sqlx::query_scalar(open).fetch_one(&mut sql).await.expect("counted");
        assert_eq!(open, 0);
    }
}

/// Returns the number of successful calls in a window of time.
pub(super) async fn rate(client: &Client, todo: &Todo) -> usize {
    let end = Instant::now() + RATE_WINDOW;
    let callers = (0..CALLERS).map(|_| {
        let (client, id) = (client.clone(), todo.id.clone());
        async move {
            let mut succeeded = 0;
            while Instant::now() < end {
                succeeded += usize::from(client.try_get_todo(&id).await.is_ok());
                sleep(PAUSE).await;
            }
            succeeded
        }
    });
    join_all(callers).await.into_iter().sum()
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum CallKind {
    Get,
    List,
    Create,
    Update,
    LogIn,
}

impl CallKind {
    pub(super) fn writes(self) -> bool {
        !matches!(self, Self::Get | Self::List)
    }
}

/// The result of a call, and how long the call took.
pub(super) struct CallResult {
    pub(super) kind: CallKind,
    pub(super) response: Result<Response<()>, Status>,
    pub(super) elapsed: Duration,
}

/// Makes concurrent calls of each kind.
pub(super) async fn make_calls(client: &Client, todo: &Todo) -> Vec<CallResult> {
    let kinds = [CallKind::Get, CallKind::List, CallKind::Create, CallKind::Update];
    // Few logins: on a busy machine, many password hashes would exceed their deadline whatever
    // the database does.
    let kinds = kinds.into_iter().cycle().take(38).chain([CallKind::LogIn; 2]);
    let calls = kinds.map(|kind| {
        let (client, id) = (client.clone(), todo.id.clone());
        let changed = Todo { etag: String::new(), ..todo.clone() };
        async move {
            let started = Instant::now();
            let response = match kind {
                CallKind::Get => client.try_get_todo(&id).await.map(discard_message),
                CallKind::List => {
                    let request = ListTodosRequest::default();
                    client.try_list_todos(request).await.map(discard_message)
                }
                CallKind::Create => {
                    client.try_create_todo(Some(todo_titled("b"))).await.map(discard_message)
                }
                CallKind::Update => {
                    let mask = Some(&["title"][..]);
                    client.try_update_todo(Some(changed), mask).await.map(discard_message)
                }
                CallKind::LogIn => {
                    let login = LoginRequest { login: "ana".into(), password: PASSWORD.into() };
                    client.auth().login(login).await.map(discard_message)
                }
            };
            CallResult { kind, response, elapsed: started.elapsed() }
        }
    });
    join_all(calls).await
}

/// Makes a call with a short deadline that only the server enforces.
pub(super) async fn call_with_short_deadline(
    address: SocketAddr,
    client: &Client,
    todo: &Todo,
) -> CallResult {
    let raw = RawClient::connect(address).await.with_token_of(client);
    let raw = raw.with_metadata("grpc-timeout", format!("{}m", SHORT_DEADLINE.as_millis()));
    let request = GetTodoRequest { id: todo.id.clone() }.encode_to_vec();
    let started = Instant::now();
    let response = raw.call("/fastzero.todo.v1.TodoService/GetTodo", &request).await;
    CallResult {
        kind: CallKind::Get,
        response: response.map(discard_message),
        elapsed: started.elapsed(),
    }
}

#[track_caller]
pub(super) fn assert_unavailable(status: &Status) {
    assert!(matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded), "{status:?}");
    assert!(status.get_error_details().error_info().is_some(), "{status:?}");
}
