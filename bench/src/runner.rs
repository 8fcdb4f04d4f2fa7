//! Runs the benchmarks and reports their metrics.

use std::{fs, time::Duration};

use tokio::time::sleep;

use crate::{
    arguments::{Benchmark, Config},
    comparison::{Round, compare_sequential},
    dataset::Dataset,
    error::Result,
    launcher::{Launcher, Target},
    load::LoadModel,
    measure::{Measurement, RunConfig, measure, statements_per_call},
    pgbench::{self, CLIENTS, Pgbench},
    postgres::Postgres,
    procfs,
    report::{Report, Threshold, Unit},
    row::mebibytes,
    scenario::Scenario,
    watch::{WRITES_PER_SECOND, measure_watches},
};

/// The connections of the memory benchmark.
const MANY_CONNECTIONS: u16 = 1_000;
/// The calls per second of the memory benchmark: fewer than a slow machine sustains.
const MANY_CONNECTIONS_RATE: f64 = 2_000.0;

/// Logins in flight for each hashing thread. More than one, so that a thread that finishes
/// finds the next login in the queue.
const LOGINS_PER_THREAD: u16 = 3;

/// How much longer the watches are measured than calls, because a replica polls once a second.
const WATCH_DURATION_FACTOR: u32 = 4;

/// How long a server is idle before its memory is read.
const IDLE_TIME: Duration = Duration::from_secs(1);

pub struct Runner<'a> {
    pub launcher: &'a Launcher,
    pub postgres: &'a Postgres,
    pub pgbench: Option<&'a Pgbench>,
    pub dataset: &'a Dataset,
    /// The dataset of [`Benchmark::Growth`], if that is run.
    pub small: Option<&'a Dataset>,
    /// The settings of the servers.
    pub config: &'a Config,
    pub connections: u16,
    pub in_flight: u16,
    pub duration: Duration,
    pub report: Report,
}

impl Runner<'_> {
    /// Runs one benchmark of a round, counted from 1.
    pub async fn run_benchmark(&mut self, benchmark: Benchmark, round: u16) -> Result<()> {
        match benchmark {
            Benchmark::Get => self.run_scenario(Scenario::Get, round).await,
            Benchmark::List => self.run_scenario(Scenario::List, round).await,
            Benchmark::Filter => self.run_scenario(Scenario::Filter, round).await,
            Benchmark::Create => self.run_scenario(Scenario::Create, round).await,
            Benchmark::Update => self.run_scenario(Scenario::Update, round).await,
            Benchmark::Mixed => self.run_scenario(Scenario::Mixed, round).await,
            Benchmark::Login => self.run_scenario(Scenario::Login, round).await,
            Benchmark::Refresh => self.run_scenario(Scenario::Refresh, round).await,
            Benchmark::SignUp => self.run_scenario(Scenario::SignUp, round).await,
            Benchmark::Latency => self.run_latency(round).await,
            Benchmark::Growth => self.run_growth().await,
            Benchmark::Pages => self.run_pages().await,
            Benchmark::Contains => self.run_contains().await,
            Benchmark::Memory => self.run_memory().await,
            Benchmark::Watch => self.run_watch().await,
            Benchmark::Start => self.run_start().await,
        }
    }

    /// Measures all targets in a closed loop, and then the service and the baseline in an
    /// open loop at half their rates.
    async fn run_scenario(&mut self, scenario: Scenario, round: u16) -> Result<()> {
        let (dataset, (connections, in_flight)) = (self.dataset, self.load_of(scenario));
        let max = (connections, LoadModel::ClosedLoop { in_flight });
        let half = |measurement: &Measurement| {
            (connections, LoadModel::OpenLoop { rate: measurement.stats.rate() / 2.0 })
        };
        let (service, previous) = self.measure_binaries(scenario, max, round).await?;
        let mut baseline = None;
        if scenario.has_baseline() {
            baseline = Some(self.measure(dataset, Target::Baseline, scenario, max).await?);
        }
        let pgbench = self.run_pgbench(scenario).await?;
        let half_rate = self.measure(dataset, Target::Service, scenario, half(&service)).await?;
        if let Some(baseline) = &baseline {
            self.measure(dataset, Target::Baseline, scenario, half(baseline)).await?;
        }
        let round = Round { service, previous, baseline, pgbench, half_rate };
        round.report(&mut self.report, self.config.limits.hashing_threads)
    }

    /// Measures the service and, with `--against`, the previous binary.
    ///
    /// The order alternates between rounds, because the first of two measurements leaves
    /// dead rows and a larger table to the second one.
    async fn measure_binaries(
        &mut self,
        scenario: Scenario,
        load: (u16, LoadModel),
        round: u16,
    ) -> Result<(Measurement, Option<Measurement>)> {
        let mut previous = None;
        if self.launcher.previous.is_some() && is_previous_first(round) {
            previous = Some(self.measure(self.dataset, Target::Previous, scenario, load).await?);
        }
        let service = self.measure(self.dataset, Target::Service, scenario, load).await?;
        if self.launcher.previous.is_some() && !is_previous_first(round) {
            previous = Some(self.measure(self.dataset, Target::Previous, scenario, load).await?);
        }
        Ok((service, previous))
    }

    async fn measure(
        &mut self,
        dataset: &Dataset,
        target: Target,
        scenario: Scenario,
        (connections, load): (u16, LoadModel),
    ) -> Result<Measurement> {
        let (warm_up, duration) = (self.duration / 4, self.duration);
        let config = RunConfig { scenario, target, connections, load, warm_up, duration };
        let measurement = measure(self.launcher, self.postgres, dataset, config).await?;
        let row = self.report.add(dataset.size, &measurement)?;
        // Counted once, because the number is the same in each round.
        if row.statements.is_none() && !row.key.is_open_loop() {
            let statements =
                statements_per_call(self.launcher, self.postgres, dataset, &measurement);
            row.statements = Some(statements.await?);
        }
        Ok(measurement)
    }

    async fn measure_sequential(
        &mut self,
        dataset: &Dataset,
        target: Target,
        scenario: Scenario,
    ) -> Result<Measurement> {
        let load = (1, LoadModel::ClosedLoop { in_flight: 1 });
        self.measure(dataset, target, scenario, load).await
    }

    /// Returns the number of connections and of the calls in flight on each.
    fn load_of(&self, scenario: Scenario) -> (u16, u16) {
        match scenario {
            // As many writers as pgbench, with which the rate is compared.
            Scenario::Create => (CLIENTS, 1),
            // As many hashes as the service admits.
            Scenario::Login | Scenario::SignUp => {
                (self.config.limits.hashing_threads.saturating_mul(LOGINS_PER_THREAD), 1)
            }
            _ => (self.connections, self.in_flight),
        }
    }

    async fn run_pgbench(&mut self, scenario: Scenario) -> Result<Option<f64>> {
        let Some(pgbench) = self.pgbench else {
            return Ok(None);
        };
        let (dataset, postgres) = (self.dataset, self.postgres);
        let before = postgres.cpu()?;
        let rate = pgbench.run(&postgres.version, dataset, scenario, self.duration).await?;
        let cpu = postgres.cpu()?.zip(before).map(|(after, before)| after.saturating_sub(before));
        if let Some(rate) = rate {
            let statements = rate * pgbench::run_time(self.duration).as_secs_f64();
            let cpu = cpu.map(|cpu| cpu.as_secs_f64() / statements);
            self.report.add_pgbench(dataset.size, scenario, rate, cpu);
        }
        Ok(rate)
    }

    async fn run_latency(&mut self, round: u16) -> Result<()> {
        let dataset = self.dataset;
        let load = (1, LoadModel::ClosedLoop { in_flight: 1 });
        let (service, previous) = self.measure_binaries(Scenario::Get, load, round).await?;
        if let Some(previous) = &previous {
            compare_sequential(&mut self.report, &service, previous);
        }
        let baseline = self.measure_sequential(dataset, Target::Baseline, Scenario::Get).await?;
        let name = "p50 of GetTodo with one call in flight ÷ baseline";
        let ratio = service.latency(0.5) / baseline.latency(0.5);
        self.report.add_metric(name, Threshold::AtMost(1.15), Unit::Ratio, ratio);
        Ok(())
    }

    async fn run_growth(&mut self) -> Result<()> {
        let (large, Some(small)) = (self.dataset, self.small) else {
            return Ok(());
        };
        let (many, few) = (large.size.todos, small.size.todos);
        let large = self.measure_sequential(large, Target::Service, Scenario::List).await?;
        let small = self.measure_sequential(small, Target::Service, Scenario::List).await?;
        let name = format!("p50 of ListTodos with {many} todos in the table ÷ with {few}");
        let ratio = large.latency(0.5) / small.latency(0.5);
        self.report.add_metric(&name, Threshold::AtMost(1.3), Unit::Ratio, ratio);
        Ok(())
    }

    async fn run_pages(&mut self) -> Result<()> {
        let dataset = self.dataset;
        let deep = self.measure_sequential(dataset, Target::Service, Scenario::DeepPage).await?;
        let first = self.measure_sequential(dataset, Target::Service, Scenario::FirstPage).await?;
        let name = format!("p50 of ListTodos, page {} ÷ page 1", dataset.size.deep_page());
        let ratio = deep.latency(0.5) / first.latency(0.5);
        self.report.add_metric(&name, Threshold::AtMost(1.3), Unit::Ratio, ratio);
        Ok(())
    }

    async fn run_contains(&mut self) -> Result<()> {
        let dataset = self.dataset;
        let search = self.measure_sequential(dataset, Target::Service, Scenario::Contains).await?;
        let (owned, all) = (dataset.size.long_list_len(), dataset.size.todos);
        let name =
            format!("p99 of ListTodos, unmatched filter for an owner of {owned} of {all} todos");
        let latency = search.latency(0.99);
        self.report.add_metric(&name, Threshold::AtMost(0.05), Unit::Milliseconds, latency);
        Ok(())
    }

    async fn run_memory(&mut self) -> Result<()> {
        let load = (MANY_CONNECTIONS, LoadModel::OpenLoop { rate: MANY_CONNECTIONS_RATE });
        let measurement = self.measure(self.dataset, Target::Service, Scenario::Get, load).await?;
        let name = format!(
            "resident memory with {MANY_CONNECTIONS} connections and {MANY_CONNECTIONS_RATE} GetTodo calls/s"
        );
        let resident = mebibytes(measurement.resident_bytes);
        self.report.add_metric(&name, Threshold::AtMost(80.0), Unit::Mebibytes, resident);
        Ok(())
    }

    async fn run_watch(&mut self) -> Result<()> {
        let dataset = self.dataset;
        let config = RunConfig {
            scenario: Scenario::Watched,
            target: Target::Service,
            connections: self.connections,
            load: LoadModel::OpenLoop { rate: WRITES_PER_SECOND },
            warm_up: self.duration / 4,
            duration: self.duration * WATCH_DURATION_FACTOR,
        };
        let measurement = measure_watches(self.launcher, self.postgres, dataset, config).await?;
        self.report.add(dataset.size, &measurement.writes)?;
        measurement.report(&mut self.report);
        Ok(())
    }

    async fn run_start(&mut self) -> Result<()> {
        let server = self.launcher.start(Target::Service, &self.dataset.database).await?;
        self.launcher.check_health(&server, &self.dataset.database).await?;
        let startup = server.startup.as_secs_f64();
        sleep(IDLE_TIME.min(self.duration)).await;
        let idle = mebibytes(procfs::resident_bytes(server.pid)?);
        let shutdown = server.stop().await?.as_secs_f64();
        let size = megabytes(fs::metadata(&self.launcher.service)?.len());
        for (name, max, unit, value) in [
            ("startup to SERVING with a migrated database", 0.15, Unit::Milliseconds, startup),
            ("shutdown without calls in flight", 0.2, Unit::Milliseconds, shutdown),
            ("resident memory when idle", 20.0, Unit::Mebibytes, idle),
            ("binary size", 16.0, Unit::Megabytes, size),
        ] {
            self.report.add_metric(name, Threshold::AtMost(max), unit, value);
        }
        Ok(())
    }
}

fn is_previous_first(round: u16) -> bool {
    round.is_multiple_of(2)
}

#[expect(clippy::cast_precision_loss, reason = "far less than 2^53 bytes")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
