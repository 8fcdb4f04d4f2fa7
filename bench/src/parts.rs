//! The parts of a run, and the figures that come of them.

use std::{
    fs,
    time::{Duration, Instant},
};

use argon2::{Algorithm, Argon2, Block, Version};
use fast_zero::{config::Config, password};
use tokio::time::sleep;

use crate::{
    Result,
    arguments::Part,
    load::Pace,
    measure::{Contender, Plan, Sample, Servers, Site, measure, statements},
    pgbench::{self, CLIENTS, Pgbench},
    postgres::Postgres,
    process,
    report::{Goal, Report, Unit},
    scenario::Scenario,
};

/// Connections for the memory that they take, and calls a second on all of them: fewer
/// than even a slow machine answers.
const MANY_CONNECTIONS: u16 = 1_000;
const RATE_OF_MANY: f64 = 2_000.0;

/// Logins under way for each hashing thread: one more waits already when one is done.
const LOGINS_PER_THREAD: u16 = 3;

/// Hashes that are timed at once.
const HASHES: u32 = 10;

/// How long a server is left alone before its memory is looked at.
const IDLE: Duration = Duration::from_secs(1);

/// What all parts share, and what comes of them.
pub struct Run<'a> {
    pub servers: &'a Servers,
    pub postgres: &'a Postgres,
    pub pgbench: Option<&'a Pgbench>,
    pub site: &'a Site,
    /// One with few to-dos.
    pub small: Option<&'a Site>,
    /// Of the service.
    pub config: &'a Config,
    pub connections: u16,
    pub in_flight: u16,
    pub duration: Duration,
    pub report: Report,
}

/// One round of a scenario. There are pgbench and the floor where they can do the same.
struct Round {
    service: Sample,
    floor: Option<Sample>,
    /// Statements a second.
    pgbench: Option<f64>,
    /// The service at half of its highest rate.
    steady: Sample,
}

impl Run<'_> {
    /// Measures one part once.
    pub async fn part(&mut self, part: Part) -> Result<()> {
        if let Some(scenario) = part.scenario() {
            return self.scenario(scenario).await;
        }
        match part {
            Part::Latency => self.latency().await,
            Part::Growth => self.growth().await,
            Part::Pages => self.pages().await,
            Part::Contains => self.contains().await,
            Part::Memory => self.memory().await,
            _ => self.start().await,
        }
    }

    async fn measure(
        &mut self,
        site: &Site,
        contender: Contender,
        scenario: Scenario,
        (connections, pace): (u16, Pace),
    ) -> Result<Sample> {
        let (warm_up, duration) = (self.duration / 4, self.duration);
        let plan = Plan { scenario, contender, connections, pace, warm_up, duration };
        let sample = measure(self.servers, self.postgres, site, plan).await?;
        let row = self.report.add(site.fill, &sample)?;
        // They are the same in each round.
        if row.statements.is_none() && matches!(pace, Pace::InFlight(_)) {
            row.statements = Some(statements(self.servers, self.postgres, site, &sample).await?);
        }
        Ok(sample)
    }

    /// Measures with one call in flight.
    async fn alone(&mut self, site: &Site, who: Contender, scenario: Scenario) -> Result<Sample> {
        self.measure(site, who, scenario, (1, Pace::InFlight(1))).await
    }

    /// Both servers in turns, as fast as they can; pgbench; and then both at half of that.
    async fn scenario(&mut self, scenario: Scenario) -> Result<()> {
        use Contender::{Floor, Service};
        let (site, (connections, in_flight)) = (self.site, self.load(scenario));
        let highest = (connections, Pace::InFlight(in_flight));
        let half = |sample: &Sample| (connections, Pace::Rate(sample.tally.rate() / 2.0));
        let service = self.measure(site, Service, scenario, highest).await?;
        let mut floor = None;
        if has_floor(scenario) {
            floor = Some(self.measure(site, Floor, scenario, highest).await?);
        }
        let pgbench = self.pgbench(scenario).await?;
        let steady = self.measure(site, Service, scenario, half(&service)).await?;
        if let Some(floor) = &floor {
            self.measure(site, Floor, scenario, half(floor)).await?;
        }
        self.compare(scenario, &Round { service, floor, pgbench, steady })
    }

    /// Connections, and calls in flight on each: what is asked for, but as many writers as
    /// pgbench has for what is compared with it, and for passwords no more than are taken.
    fn load(&self, scenario: Scenario) -> (u16, u16) {
        match scenario {
            Scenario::Create => (CLIENTS, 1),
            Scenario::Login | Scenario::SignUp => {
                (self.config.hashing_threads.saturating_mul(LOGINS_PER_THREAD), 1)
            }
            _ => (self.connections, self.in_flight),
        }
    }

    async fn pgbench(&mut self, scenario: Scenario) -> Result<Option<f64>> {
        let Some(pgbench) = self.pgbench else {
            return Ok(None);
        };
        let (site, postgres) = (self.site, self.postgres);
        let before = postgres.cpu()?;
        let rate = pgbench.run(postgres, site, scenario, self.duration).await?;
        let cpu = postgres.cpu()?.zip(before).map(|(after, before)| after.saturating_sub(before));
        if let Some(rate) = rate {
            let calls = rate * pgbench::time(self.duration).as_secs_f64();
            let cpu = cpu.map(|cpu| cpu.as_secs_f64() / calls);
            self.report.add_pgbench(site.fill, scenario, rate, cpu);
        }
        Ok(rate)
    }

    /// The figures of a scenario.
    fn compare(&mut self, scenario: Scenario, round: &Round) -> Result<()> {
        if let Some(floor) = &round.floor {
            self.compare_with_floor(scenario, &round.service, floor);
        }
        let rate = round.service.tally.rate();
        match (scenario, round.pgbench) {
            (Scenario::Get, _) => {
                let name = "p99 ÷ p50 of GetTodo at half of its highest rate";
                let spread = round.steady.latency(0.99) / round.steady.latency(0.5);
                self.report.figure(name, Goal::AtMost(3.0), Unit::Ratio, spread);
            }
            (Scenario::Create, Some(pgbench)) => {
                let name = format!("rate of CreateTodo at {CLIENTS} writers ÷ pgbench's INSERT");
                self.report.figure(&name, Goal::AtLeast(1.0), Unit::Ratio, rate / pgbench);
            }
            (Scenario::Login, _) => {
                let hash = time_of_a_hash()?.as_secs_f64();
                let most = f64::from(self.config.hashing_threads) / hash;
                let name = "logins a second ÷ (hashing threads ÷ time of one hash)";
                self.report.figure(name, Goal::AtLeast(0.9), Unit::Ratio, rate / most);
                self.report.figure("time of one hash", Goal::None, Unit::Milliseconds, hash);
            }
            _ => {}
        }
        Ok(())
    }

    fn compare_with_floor(&mut self, scenario: Scenario, service: &Sample, floor: &Sample) {
        let (rate_goal, cpu_goal) = match scenario {
            Scenario::Get => (Goal::AtLeast(1.5), Goal::AtMost(0.7)),
            Scenario::List | Scenario::Update => (Goal::AtLeast(0.9), Goal::None),
            _ => (Goal::None, Goal::None),
        };
        let rates = service.tally.rate() / floor.tally.rate();
        let name = format!("rate of {scenario} ÷ floor's");
        self.report.figure(&name, rate_goal, Unit::Ratio, rates);
        if let Some((service, floor)) = service.cpu().zip(floor.cpu()) {
            let name = format!("CPU of server and PostgreSQL for {scenario} ÷ floor's");
            self.report.figure(&name, cpu_goal, Unit::Ratio, service / floor);
        }
    }

    async fn latency(&mut self) -> Result<()> {
        let service = self.alone(self.site, Contender::Service, Scenario::Get).await?;
        let floor = self.alone(self.site, Contender::Floor, Scenario::Get).await?;
        let name = "p50 of GetTodo with one call in flight ÷ floor's";
        let ratio = service.latency(0.5) / floor.latency(0.5);
        self.report.figure(name, Goal::AtMost(1.15), Unit::Ratio, ratio);
        Ok(())
    }

    async fn growth(&mut self) -> Result<()> {
        let (large, Some(small)) = (self.site, self.small) else {
            return Ok(());
        };
        let in_large = self.alone(large, Contender::Service, Scenario::List).await?;
        let in_small = self.alone(small, Contender::Service, Scenario::List).await?;
        let (many, few) = (large.fill.todos, small.fill.todos);
        let name = format!("p50 of ListTodos with {many} to-dos in the table ÷ with {few}");
        let ratio = in_large.latency(0.5) / in_small.latency(0.5);
        self.report.figure(&name, Goal::AtMost(1.3), Unit::Ratio, ratio);
        Ok(())
    }

    async fn pages(&mut self) -> Result<()> {
        let late = self.alone(self.site, Contender::Service, Scenario::LatePage).await?;
        let first = self.alone(self.site, Contender::Service, Scenario::FirstPage).await?;
        let name = format!("p50 of ListTodos, page {} ÷ page 1", self.site.fill.late_page());
        let ratio = late.latency(0.5) / first.latency(0.5);
        self.report.figure(&name, Goal::AtMost(1.3), Unit::Ratio, ratio);
        Ok(())
    }

    async fn contains(&mut self) -> Result<()> {
        let searched = self.alone(self.site, Contender::Service, Scenario::Contains).await?;
        let (own, all) = (self.site.fill.many(), self.site.fill.todos);
        let name =
            format!("p99 of a contains-filter for an owner of {own} to-dos in a table of {all}");
        self.report.figure(&name, Goal::AtMost(0.05), Unit::Milliseconds, searched.latency(0.99));
        Ok(())
    }

    async fn memory(&mut self) -> Result<()> {
        let many = (MANY_CONNECTIONS, Pace::Rate(RATE_OF_MANY));
        let loaded = self.measure(self.site, Contender::Service, Scenario::Get, many).await?;
        let name = format!(
            "resident memory with {MANY_CONNECTIONS} connections and {RATE_OF_MANY} GetTodo a second"
        );
        let resident = mebibytes(loaded.resident);
        self.report.figure(&name, Goal::AtMost(80.0), Unit::Mebibytes, resident);
        Ok(())
    }

    async fn start(&mut self) -> Result<()> {
        let server = self.servers.start(Contender::Service, &self.site.database).await?;
        if !server.is_serving().await {
            return Err("health does not say SERVING".into());
        }
        let started_in = server.started_in.as_secs_f64();
        sleep(IDLE.min(self.duration)).await;
        let idle = mebibytes(process::resident(server.pid)?);
        let stopped_in = server.stop().await?.as_secs_f64();
        let size = millions(fs::metadata(&self.servers.binary)?.len());
        let report = &mut self.report;
        let name = "start to SERVING, the database there and migrated";
        report.figure(name, Goal::AtMost(0.15), Unit::Milliseconds, started_in);
        report.figure("stop, without calls", Goal::AtMost(0.2), Unit::Milliseconds, stopped_in);
        report.figure("resident memory, idle", Goal::AtMost(20.0), Unit::Mebibytes, idle);
        report.figure("size of the binary", Goal::AtMost(16.0), Unit::Megabytes, size);
        Ok(())
    }
}

/// How long one hash of a password takes when nothing else is done, with memory that is
/// there already.
fn time_of_a_hash() -> Result<Duration> {
    let cost = password::default_cost();
    let mut memory = vec![Block::default(); cost.block_count()];
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, cost);
    let mut hash = || {
        let mut output = [0; 32];
        argon2.hash_password_into_with_memory(b"a password", &[1; 16], &mut output, &mut memory)
    };
    // The first one touches the memory.
    hash().map_err(|error| error.to_string())?;
    let begun = Instant::now();
    for _ in 0..HASHES {
        hash().map_err(|error| error.to_string())?;
    }
    Ok(begun.elapsed() / HASHES)
}

fn has_floor(scenario: Scenario) -> bool {
    use Scenario::{Create, Filter, Get, List, Mixed, Update};
    matches!(scenario, Get | List | Filter | Create | Update | Mixed)
}

#[expect(clippy::cast_precision_loss, reason = "far less than 2^53")]
fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}

#[expect(clippy::cast_precision_loss, reason = "far less than 2^53")]
fn millions(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
