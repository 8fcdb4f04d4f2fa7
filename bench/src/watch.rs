//! A measurement with watches: the lag from a write to its message, on the replica that makes the
//! write and on another one.
//!
//! Each owner has one watch on each of two replicas, so both replicas report the same writes. A
//! lag counts from the scheduled start of the write, so it contains the write itself, and it
//! cannot be negative. It ends when this process has decoded the message.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use fast_zero::proto::todo::v1::{WatchTodosRequest, WatchTodosResponse, todo_change::Change};
use tokio::{
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinSet,
    time::timeout,
};
use tonic::{Status, Streaming};

use crate::{
    client::Client,
    dataset::Dataset,
    error::{BoxError, Result},
    fixtures::Fixtures,
    lag::{Arrival, Lags, Write, version},
    launcher::Launcher,
    load::{self, CallStats, LoadModel, quantile_seconds, run_open_loop},
    measure::{CpuTimes, Measurement, RunConfig},
    postgres::Postgres,
    procfs::resident_bytes,
    report::{Report, Threshold, Unit},
    row::mebibytes,
    scenario::{self, Scenario},
    server::Server,
};

/// The rate of the writes, in calls per second.
pub const WRITES_PER_SECOND: f64 = 200.0;

/// The replicas. The first one makes the writes.
const REPLICA_COUNT: usize = 2;

/// Fewer than the 128 streams that a connection may have.
const WATCHES_PER_CONNECTION: usize = 100;

/// How long the watches may take to start.
const OPEN_TIMEOUT: Duration = Duration::from_mins(1);
/// How long the messages of the last writes may take: several polls.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long connects and the last calls may take in addition.
const EXTRA_TIME: Duration = Duration::from_secs(30);

/// The count of the polls of a replica.
const POLLS: &str = "fastzero_watch_poll_duration_seconds_count";

/// The result of a measurement with watches.
pub struct WatchMeasurement {
    /// The writes. The CPU time is that of both replicas, the memory that of the first one.
    pub writes: Measurement,
    /// The watches on each replica.
    watch_count: usize,
    lags: Lags,
    /// The CPU times during the writes.
    cpu: CpuTimes,
    /// The memory that the replica with the higher growth took for idle watches.
    idle_bytes: u64,
    /// The average of all replicas.
    polls_per_second: f64,
}

impl WatchMeasurement {
    /// Adds the metrics of this measurement.
    pub fn report(&self, report: &mut Report) {
        let watches = self.watch_count;
        for (replica, max_p99, lag) in [
            ("the writing replica", 0.05, &self.lags.latencies[0]),
            ("another replica", 1.2, &self.lags.latencies[1]),
        ] {
            for (quantile, name, threshold) in
                [(0.5, "p50", Threshold::None), (0.99, "p99", Threshold::AtMost(max_p99))]
            {
                let name = format!("{name} of the lag of a watch on {replica}");
                let seconds = quantile_seconds(lag, quantile);
                report.add_metric(&name, threshold, Unit::Milliseconds, seconds);
            }
        }
        let elapsed = self.writes.stats.elapsed.as_secs_f64();
        let [writing, other] = [0, 1].map(|replica| Some(self.cpu.servers[replica]));
        let of = [("the writing replica", writing), ("another replica", other)];
        for (process, cpu) in of.into_iter().chain([("PostgreSQL", self.cpu.postgres)]) {
            let name = format!(
                "CPU of {process} with {watches} watches per replica and {WRITES_PER_SECOND} writes/s"
            );
            if let Some(cpu) = cpu {
                let cores = cpu.as_secs_f64() / elapsed;
                report.add_metric(&name, Threshold::None, Unit::Cores, cores);
            }
        }
        let name = format!("resident memory of {watches} idle watches");
        let resident = mebibytes(self.idle_bytes);
        report.add_metric(&name, Threshold::AtMost(40.0), Unit::Mebibytes, resident);
        let name = format!("polls of a replica with {watches} watches");
        report.add_metric(&name, Threshold::AtMost(1.1), Unit::PerSecond, self.polls_per_second);
    }
}

/// Starts two replicas, measures them and stops them.
///
/// # Errors
/// Also if a watch ends, or if the message of a write does not arrive.
pub async fn measure_watches(
    launcher: &Launcher,
    postgres: &Postgres,
    dataset: &Dataset,
    config: RunConfig,
) -> Result<WatchMeasurement> {
    let mut replicas = Vec::new();
    for number in 1..=REPLICA_COUNT {
        replicas.push(launcher.start_replica(number, &dataset.database).await?);
    }
    let limit = OPEN_TIMEOUT + config.warm_up + config.duration + MESSAGE_TIMEOUT + EXTRA_TIME;
    let result = timeout(limit, measure_replicas(&replicas, postgres, dataset, config)).await;
    let measurement = result.map_err(Into::into).flatten().map_err(|error| {
        let logs = replicas.iter().map(Server::log_tail).collect::<Vec<_>>().join("\n");
        format!("{}: {error}\n{logs}", config.scenario)
    })?;
    for replica in replicas {
        replica.stop().await?;
    }
    Ok(measurement)
}

async fn measure_replicas(
    replicas: &[Server],
    postgres: &Postgres,
    dataset: &Dataset,
    config: RunConfig,
) -> Result<WatchMeasurement> {
    let resident =
        || replicas.iter().map(|replica| resident_bytes(replica.pid)).collect::<Result<Vec<_>>>();
    let fixtures = &dataset.fixtures;
    let without_watches = resident()?;
    let mut watches = Watches::open(replicas, fixtures).await?;
    let growth = resident()?.into_iter().zip(without_watches);
    let growth = growth.map(|(with, without)| with.saturating_sub(without));
    let mut clients = Vec::new();
    for _ in 0..config.connections {
        clients.push(Client::connect(&replicas[0].address).await?);
    }
    let RunConfig { load, warm_up, duration, .. } = config;
    load::run(&clients, fixtures, Scenario::Watched, load, warm_up).await?;
    let (polls, polled_at) = (poll_count(replicas).await?, Instant::now());
    let before = CpuTimes::now(replicas, postgres)?;
    let (stats, writes) = write(clients, fixtures.clone(), load, duration).await?;
    let cpu = CpuTimes::now(replicas, postgres)?.since(&before);
    let seconds = polled_at.elapsed().as_secs_f64();
    let polls = poll_count(replicas).await? - polls;
    let writes_resident = resident()?[0];
    let lags = watches.receive(writes).await?;
    Ok(WatchMeasurement {
        writes: Measurement::new(config, stats, &cpu, writes_resident),
        watch_count: fixtures.watched.len(),
        lags,
        cpu,
        idle_bytes: growth.max().unwrap_or_default(),
        polls_per_second: polls / seconds / f64::from(u32::try_from(replicas.len())?),
    })
}

/// Returns the number of polls of all replicas since their starts.
async fn poll_count(replicas: &[Server]) -> Result<f64> {
    let mut count = 0.0;
    for replica in replicas {
        count += replica.metric(POLLS).await?;
    }
    Ok(count)
}

/// Updates todos of all owners in rotation, and returns the successful writes.
async fn write(
    clients: Vec<Client>,
    fixtures: Arc<Fixtures>,
    load: LoadModel,
    duration: Duration,
) -> Result<(CallStats, Vec<Write>)> {
    let LoadModel::OpenLoop { rate } = load else {
        return Err("writes to watched todos need an open loop".into());
    };
    let writes = Arc::new(Mutex::new(Vec::new()));
    let written = writes.clone();
    let call = move |number: usize, scheduled_at| {
        let mut client = clients[number % clients.len()].clone();
        let (fixtures, written) = (fixtures.clone(), written.clone());
        async move {
            let owner = number % fixtures.watched.len();
            let caller = fixtures.watched(owner);
            let todo = scenario::update(&mut client, &fixtures, caller).await?;
            let write = Write { owner, version: version(&todo), scheduled_at };
            written.lock().unwrap_or_else(PoisonError::into_inner).push(write);
            Ok(())
        }
    };
    let stats = run_open_loop(rate, duration, call).await?;
    let writes = std::mem::take(&mut *writes.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((stats, writes))
}

/// The open watches. They end on drop.
struct Watches {
    arrivals: UnboundedReceiver<Result<Arrival, Status>>,
    _tasks: JoinSet<()>,
}

/// A watch that has caught up.
struct OpenWatch {
    replica: usize,
    owner: usize,
    stream: Streaming<WatchTodosResponse>,
}

impl Watches {
    /// Opens a watch of each owner on each replica, and waits until all have caught up.
    async fn open(replicas: &[Server], fixtures: &Arc<Fixtures>) -> Result<Self> {
        let mut connections = JoinSet::new();
        for (replica, server) in replicas.iter().enumerate() {
            for first in (0..fixtures.watched.len()).step_by(WATCHES_PER_CONNECTION) {
                let (address, fixtures) = (server.address.clone(), fixtures.clone());
                connections
                    .spawn(async move { open_some(replica, &address, &fixtures, first).await });
            }
        }
        let (sender, arrivals) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        while let Some(opened) = timeout(OPEN_TIMEOUT, connections.join_next()).await? {
            for watch in opened?? {
                tasks.spawn(follow(watch, sender.clone()));
            }
        }
        Ok(Self { arrivals, _tasks: tasks })
    }

    /// Receives the messages of the writes.
    async fn receive(&mut self, writes: Vec<Write>) -> Result<Lags> {
        let mut lags = Lags::new(REPLICA_COUNT, writes)?;
        let receive = async {
            while !lags.is_complete() {
                lags.record(&self.arrivals.recv().await.ok_or("all watches have ended")??);
            }
            Ok::<_, BoxError>(())
        };
        match timeout(MESSAGE_TIMEOUT, receive).await {
            Ok(result) => result.map(|()| lags),
            Err(_) => Err(format!("{} messages did not arrive", lags.pending_count()).into()),
        }
    }
}

/// Opens the watches of up to [`WATCHES_PER_CONNECTION`] owners on one connection.
async fn open_some(
    replica: usize,
    address: &str,
    fixtures: &Fixtures,
    first: usize,
) -> Result<Vec<OpenWatch>> {
    let mut client = Client::connect(address).await?;
    let mut watches = Vec::new();
    let owners = fixtures.watched.iter().enumerate().skip(first).take(WATCHES_PER_CONNECTION);
    for (owner, caller) in owners {
        let request = WatchTodosRequest { from_now: true, ..Default::default() };
        let response = client.todos.watch_todos(caller.authorized(request)).await?;
        let mut stream = response.into_inner();
        let message = stream.message().await?.ok_or("a watch has ended without a message")?;
        if !message.caught_up {
            return Err("a watch from now does not start at the present".into());
        }
        watches.push(OpenWatch { replica, owner, stream });
    }
    Ok(watches)
}

/// Reports the messages of a watch, and its end.
async fn follow(watch: OpenWatch, sender: UnboundedSender<Result<Arrival, Status>>) {
    let OpenWatch { replica, owner, mut stream } = watch;
    loop {
        let message = stream.message().await;
        let at = Instant::now();
        let Some(message) = message.transpose() else {
            let _ = sender.send(Err(Status::unavailable("a watch has ended")));
            return;
        };
        let is_end = message.is_err();
        // A message without changes is a checkpoint.
        let version = message.map(|message| last_version(&message)).transpose();
        let Some(version) = version else {
            continue;
        };
        let arrival = version.map(|version| Arrival { replica, owner, version, at });
        if sender.send(arrival).is_err() || is_end {
            return;
        }
    }
}

/// Returns the greatest version in a message, or `None` if it contains no todo.
fn last_version(message: &WatchTodosResponse) -> Option<i64> {
    let todos = message.changes.iter().filter_map(|change| match &change.change {
        Some(Change::Todo(todo)) => Some(version(todo)),
        _ => None,
    });
    todos.max()
}
