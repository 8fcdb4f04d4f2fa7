//! Two replicas behind a load balancer.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use nix::sys::signal::Signal;
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::support::{
    Client, RpcResult,
    app::connect,
    follower::follow,
    load_balancer::LoadBalancer,
    postgres::TestDatabase,
    process::{Binary, Process},
    todos::todo_titled,
};

/// A method in the log of each replica that receives calls.
const CREATE_TODO: &str = "TodoService/CreateTodo";

const USERS: usize = 8;
const CALLERS_PER_USER: usize = 4;

/// The pause between two calls of a caller, so that concurrent tests make progress.
const PAUSE: Duration = Duration::from_millis(10);

/// Longer than the load balancer takes to notice that a replica is NOT_SERVING, in seconds.
const SHUTDOWN_DELAY: &str = "2";

fn start(database: &TestDatabase) -> Process {
    Binary::server(&database.url()).env("SHUTDOWN_DELAY_SECONDS", SHUTDOWN_DELAY).start()
}

async fn join(balancer: &LoadBalancer, replica: &Process) {
    balancer.add(replica.address().await.parse().expect("an address")).await;
}

/// Totals of all callers.
#[derive(Default)]
struct Totals {
    calls: AtomicUsize,
    retried: AtomicUsize,
}

impl Totals {
    /// Makes a call, and retries it once if it fails with UNAVAILABLE.
    async fn call_with_retry<T, F>(&self, call: impl Fn() -> F) -> Result<T, Status>
    where
        F: Future<Output = RpcResult<T>>,
    {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let response = match call().await {
            Err(status) if status.code() == Code::Unavailable => {
                self.retried.fetch_add(1, Ordering::Relaxed);
                call().await
            }
            response => response,
        };
        response.map(tonic::Response::into_inner)
    }

    /// Writes and reads until `end` is cancelled. Returns the acknowledged titles.
    async fn work(
        &self,
        client: &Client,
        name: usize,
        end: CancellationToken,
    ) -> Result<Vec<String>, Status> {
        let mut acknowledged = Vec::new();
        while !end.is_cancelled() {
            let title = format!("{name}/{}", acknowledged.len());
            let create = || client.try_create_todo(Some(todo_titled("to be named")));
            let todo = self.call_with_retry(create).await?.todo.expect("a todo");
            sleep(PAUSE).await;
            // Without an etag, the update is idempotent.
            let named = Todo { id: todo.id.clone(), title: title.clone(), ..Todo::default() };
            let rename = || client.try_update_todo(Some(named.clone()), Some(&["title"]));
            self.call_with_retry(rename).await?;
            acknowledged.push(title);
            sleep(PAUSE).await;
            let read = self.call_with_retry(|| client.try_get_todo(&todo.id)).await?;
            assert_eq!(read.todo.expect("a todo").title, named.title);
            sleep(PAUSE).await;
        }
        Ok(acknowledged)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_fails_no_call_that_is_retried_once() {
    let database = TestDatabase::create().await;
    let mut replicas = [start(&database), start(&database)];
    let balancer = LoadBalancer::start().await;
    for replica in &replicas {
        join(&balancer, replica).await;
    }
    let (totals, end) = (Arc::<Totals>::default(), CancellationToken::new());
    let (mut users, mut working) = (Vec::new(), JoinSet::new());
    for user in 0..USERS {
        let channel = connect(balancer.address).await;
        let client = Client::new(channel).signed_up(&format!("user{user}")).await;
        users.push(client.clone());
        for caller in 0..CALLERS_PER_USER {
            let (client, totals, end) = (client.clone(), totals.clone(), end.clone());
            let name = user * CALLERS_PER_USER + caller;
            working.spawn(async move { totals.work(&client, name, end).await });
        }
    }

    for replica in &replicas {
        replica.wait_for_line(CREATE_TODO).await;
    }

    let started = Instant::now();
    for replica in &mut replicas {
        replica.signal(Signal::SIGTERM);
        assert_eq!(replica.wait().await.code(), Some(0));
        assert!(!replica.output().contains("grace period expired"), "{}", replica.output());
        *replica = start(&database);
        join(&balancer, replica).await;
        replica.wait_for_line(CREATE_TODO).await;
    }
    let took = started.elapsed();
    end.cancel();
    let (mut acknowledged, mut failed) = (BTreeSet::new(), Vec::new());
    for ended in working.join_all().await {
        match ended {
            Ok(titles) => acknowledged.extend(titles),
            Err(status) => failed.push(status),
        }
    }
    println!(
        "two replicas restarted in {took:.1?}: {} callers, {} calls, {} retried, {} failed, \
         {} acknowledged todos",
        USERS * CALLERS_PER_USER,
        totals.calls.load(Ordering::Relaxed),
        totals.retried.load(Ordering::Relaxed),
        failed.len(),
        acknowledged.len(),
    );
    assert!(failed.is_empty(), "{failed:#?}");

    let mut stored = BTreeSet::new();
    for user in users {
        let todos = user.list_all_todos(ListTodosRequest::default()).await;
        stored.extend(todos.into_iter().map(|todo| todo.title));
    }
    let lost: Vec<_> = acknowledged.difference(&stored).collect();
    assert!(lost.is_empty(), "{lost:?}");
}

/// The watches of each user, on one connection.
const WATCHES_PER_USER: usize = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watches_resume_on_the_other_replica_and_miss_nothing() {
    const USERS: usize = 4;
    let database = TestDatabase::create().await;
    let mut replicas = [start(&database), start(&database)];
    let balancer = LoadBalancer::start().await;
    for replica in &replicas {
        join(&balancer, replica).await;
    }
    let (totals, end) = (Arc::<Totals>::default(), CancellationToken::new());
    let (mut users, mut working, mut following) = (Vec::new(), JoinSet::new(), JoinSet::new());
    for user in 0..USERS {
        let client = Client::new(connect(balancer.address).await);
        let client = client.signed_up(&format!("user{user}")).await;
        let (writer, totals, end) = (client.clone(), totals.clone(), end.clone());
        working.spawn(async move { totals.work(&writer, user, end).await });
        for _ in 0..WATCHES_PER_USER {
            let follower = client.clone();
            following.spawn(async move { (user, follow(follower, "the last todo").await) });
        }
        users.push(client);
    }
    for replica in &mut replicas {
        // Both have open watches, because the load balancer takes them in turn.
        replica.wait_for_line(CREATE_TODO).await;
        replica.signal(Signal::SIGTERM);
        assert_eq!(replica.wait().await.code(), Some(0));
        assert!(!replica.output().contains("grace period expired"), "{}", replica.output());
        *replica = start(&database);
        join(&balancer, replica).await;
    }
    end.cancel();
    for ended in working.join_all().await {
        ended.expect("one retry is enough");
    }
    let mut todos = Vec::new();
    for user in &users {
        user.create_todo("the last todo").await;
        todos.push(user.list_all_todos(ListTodosRequest::default()).await);
    }
    let (mut resumed, mut broken, mut changes) = (0, 0, 0);
    for (user, followed) in following.join_all().await {
        let copied: Vec<_> = followed.copy.todos.clone().into_values().collect();
        assert_eq!(copied, todos[user]);
        assert_eq!(followed.full_syncs, 1, "a watch resumes at its cursor");
        let stopped = followed.ends_with_reason("STOPPING");
        (resumed, changes) = (resumed + stopped, changes + copied.len());
        broken += followed.ends.len() - stopped;
    }
    println!(
        "two replicas restarted: {} watches, {resumed} resumed, {broken} broken, {changes} todos",
        USERS * WATCHES_PER_USER
    );
    // Each of the watches is at one of the replicas when it stops, and later at the other one.
    assert!(resumed >= USERS * WATCHES_PER_USER && broken == 0, "{resumed}, {broken}");
}
