//! One measurement: a server process of its own, calls, and the resources that they take.

use std::{process, slice, time::Duration};

use tokio::time::timeout;

use crate::{
    client::Client,
    dataset::Dataset,
    error::Result,
    launcher::{Launcher, Target},
    load::{self, CallStats, LoadModel, quantile_seconds},
    postgres::Postgres,
    procfs::{self, ProcessStat},
    scenario::Scenario,
    server::Server,
};

/// How long the connects and the last calls may take in addition to the duration of a run.
const EXTRA_TIME: Duration = Duration::from_secs(30);

/// What a measurement does.
#[derive(Clone, Copy, Debug)]
pub struct RunConfig {
    pub scenario: Scenario,
    pub target: Target,
    pub connections: u16,
    pub load: LoadModel,
    /// How long calls run before the measurement.
    pub warm_up: Duration,
    pub duration: Duration,
}

/// The result of a measurement.
#[derive(Clone, Debug)]
pub struct Measurement {
    pub config: RunConfig,
    pub stats: CallStats,
    /// The CPU time of the server, or of all replicas.
    pub server_cpu: Duration,
    /// The CPU time of PostgreSQL, if it runs on this machine.
    pub postgres_cpu: Option<Duration>,
    /// The CPU time of this process, which makes the calls.
    pub client_cpu: Duration,
    /// The CPU time of all other processes on this machine. Contains PostgreSQL's if
    /// `postgres_cpu` is `None`.
    pub other_cpu: Duration,
    /// The server's resident set size with all connections open.
    pub resident_bytes: u64,
    /// The transactions during the lifetime of the server.
    transactions: i64,
    /// The calls during the lifetime of the server, warm-up included.
    lifetime_calls: u64,
}

impl Measurement {
    /// Returns a measurement of calls that took this CPU time, without its transactions.
    pub fn new(config: RunConfig, stats: CallStats, cpu: &CpuTimes, resident_bytes: u64) -> Self {
        let server_cpu = cpu.servers.iter().sum();
        let known = server_cpu + cpu.postgres.unwrap_or_default() + cpu.client;
        Self {
            config,
            server_cpu,
            postgres_cpu: cpu.postgres,
            client_cpu: cpu.client,
            other_cpu: cpu.machine.saturating_sub(known),
            resident_bytes,
            transactions: 0,
            lifetime_calls: stats.calls(),
            stats,
        }
    }

    /// Returns the CPU time of server and PostgreSQL per call, in seconds. Returns `None`
    /// if PostgreSQL runs on another machine.
    pub fn cpu_per_call(&self) -> Option<f64> {
        Some(self.per_call(self.server_cpu + self.postgres_cpu?))
    }

    /// Divides a time by the number of calls. Returns seconds.
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53 calls")]
    pub fn per_call(&self, time: Duration) -> f64 {
        time.as_secs_f64() / self.stats.calls() as f64
    }

    /// Returns a quantile of the latencies, in seconds.
    pub fn latency(&self, quantile: f64) -> f64 {
        quantile_seconds(&self.stats.latencies, quantile)
    }
}

/// The CPU times up to one instant, or between two.
pub struct CpuTimes {
    /// Those of the replicas, or of the only server.
    pub servers: Vec<Duration>,
    pub postgres: Option<Duration>,
    client: Duration,
    machine: Duration,
}

impl CpuTimes {
    pub fn now(servers: &[Server], postgres: &Postgres) -> Result<Self> {
        let cpu = |server: &Server| Ok(ProcessStat::read(server.pid)?.cpu);
        let client = i32::try_from(process::id())?;
        Ok(Self {
            servers: servers.iter().map(cpu).collect::<Result<_>>()?,
            postgres: postgres.cpu()?,
            client: ProcessStat::read(client)?.cpu,
            machine: procfs::machine_cpu()?,
        })
    }

    pub fn since(&self, earlier: &Self) -> Self {
        let servers = self.servers.iter().zip(&earlier.servers);
        let postgres = self.postgres.zip(earlier.postgres);
        Self {
            servers: servers.map(|(now, earlier)| now.saturating_sub(*earlier)).collect(),
            postgres: postgres.map(|(now, earlier)| now.saturating_sub(earlier)),
            client: self.client.saturating_sub(earlier.client),
            machine: self.machine.saturating_sub(earlier.machine),
        }
    }
}

/// Starts a server, measures it and stops it. The server runs for one measurement only, so
/// that PostgreSQL's transactions in its lifetime can be counted.
pub async fn measure(
    launcher: &Launcher,
    postgres: &Postgres,
    dataset: &Dataset,
    config: RunConfig,
) -> Result<Measurement> {
    let transactions = postgres.transactions(&dataset.database).await?;
    let server = launcher.start(config.target, &dataset.database).await?;
    let limit = config.warm_up + config.duration + EXTRA_TIME;
    let result = timeout(limit, make_calls(launcher, &server, postgres, dataset, config)).await;
    let mut measurement = result.map_err(Into::into).flatten().map_err(|error| {
        format!("{}, {}: {error}\n{}", config.scenario, config.target, server.log_tail())
    })?;
    server.stop().await?;
    measurement.transactions = postgres.transactions(&dataset.database).await? - transactions;
    Ok(measurement)
}

async fn make_calls(
    launcher: &Launcher,
    server: &Server,
    postgres: &Postgres,
    dataset: &Dataset,
    config: RunConfig,
) -> Result<Measurement> {
    let mut clients = Vec::new();
    for _ in 0..config.connections {
        clients.push(Client::connect(&server.address).await?);
    }
    let RunConfig { scenario, load, .. } = config;
    let fixtures = dataset.fixtures_of(launcher, config.target);
    let warm_up = load::run(&clients, fixtures, scenario, load, config.warm_up).await?;
    let servers = slice::from_ref(server);
    let before = CpuTimes::now(servers, postgres)?;
    let stats = load::run(&clients, fixtures, scenario, load, config.duration).await?;
    let cpu = CpuTimes::now(servers, postgres)?.since(&before);
    let mut measurement =
        Measurement::new(config, stats, &cpu, procfs::resident_bytes(server.pid)?);
    measurement.lifetime_calls += warm_up.calls();
    Ok(measurement)
}

/// Returns how many statements a warm server runs per call.
///
/// Measures again without the measured part, and divides the difference in transactions by
/// the difference in calls. The result includes the few statements that the server runs
/// periodically. PostgreSQL counts each statement outside of a transaction block as a
/// transaction.
#[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53 calls")]
pub async fn statements_per_call(
    launcher: &Launcher,
    postgres: &Postgres,
    dataset: &Dataset,
    measurement: &Measurement,
) -> Result<f64> {
    let config = RunConfig { duration: Duration::ZERO, ..measurement.config };
    let warm_up = measure(launcher, postgres, dataset, config).await?;
    let calls = measurement.lifetime_calls.saturating_sub(warm_up.lifetime_calls).max(1);
    Ok((measurement.transactions - warm_up.transactions) as f64 / calls as f64)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Returns a closed-loop measurement with this rate, CPU time per call and memory.
    pub fn measurement(
        (scenario, target): (Scenario, Target),
        calls_per_second: u32,
        cpu_per_call: Duration,
        resident_bytes: u64,
    ) -> Measurement {
        let mut stats = CallStats::new().expect("a histogram");
        stats.latencies.record_n(1_000_000, calls_per_second.into()).expect("in range");
        stats.elapsed = Duration::from_secs(1);
        let load = LoadModel::ClosedLoop { in_flight: 8 };
        let (warm_up, duration) = (Duration::ZERO, stats.elapsed);
        Measurement {
            config: RunConfig { scenario, target, connections: 8, load, warm_up, duration },
            stats,
            server_cpu: cpu_per_call * calls_per_second / 2,
            postgres_cpu: Some(cpu_per_call * calls_per_second / 2),
            client_cpu: Duration::ZERO,
            other_cpu: Duration::ZERO,
            resident_bytes,
            transactions: 0,
            lifetime_calls: 0,
        }
    }

    #[test]
    fn cpu_per_call_is_the_cpu_time_of_server_and_postgresql() {
        let cpu = Duration::from_micros(40);
        let measurement = measurement((Scenario::Get, Target::Service), 1_000, cpu, 0);
        assert!((measurement.cpu_per_call().expect("local") - 40e-6).abs() < 1e-9);
        assert!((measurement.latency(0.5) - 1e-3).abs() < 1e-5);
    }
}
