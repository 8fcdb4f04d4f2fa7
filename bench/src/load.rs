//! Load: calls as fast as they are answered, or at a given rate.

use std::{
    collections::BTreeMap,
    os::fd::{AsFd, AsRawFd, RawFd},
    sync::Arc,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use tokio::{io::unix::AsyncFd, task::JoinSet};
use tonic::Status;

use crate::{
    Result,
    client::Client,
    scenario::{Scenario, World},
};

/// The longest latency that is told from longer ones, in nanoseconds: a minute.
const LONGEST: u64 = 60_000_000_000;
/// Latencies are kept to three digits.
const DIGITS: u8 = 3;

/// Calls that may be under way at a given rate: the server has long been overrun then.
const MAX_UNDER_WAY: usize = 10_000;

/// How calls come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// Closed loop: the next call begins when one has been answered, so that as many as
    /// this are under way on each connection. It tells the highest rate; its latencies
    /// leave out what callers would have waited who do not wait for each other.
    InFlight(u16),
    /// Open loop: a call begins when its time has come, as many a second as this, and
    /// latency counts from that time, whether the call could begin then or not.
    Rate(f64),
}

/// What came of calls.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Of those that were answered well, in nanoseconds.
    pub latencies: Histogram<u64>,
    /// The others, by their code.
    pub failures: BTreeMap<i32, u64>,
    /// From the first call to the last answer.
    pub elapsed: Duration,
}

impl Tally {
    pub fn new() -> Result<Self> {
        let latencies = Histogram::new_with_max(LONGEST, DIGITS)?;
        Ok(Self { latencies, failures: BTreeMap::new(), elapsed: Duration::ZERO })
    }

    /// Calls that were answered well.
    pub fn calls(&self) -> u64 {
        self.latencies.len()
    }

    /// Such calls a second.
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53")]
    pub fn rate(&self) -> f64 {
        self.calls() as f64 / self.elapsed.as_secs_f64()
    }

    /// All calls.
    pub fn all(&self) -> u64 {
        self.calls() + self.failures.values().sum::<u64>()
    }

    fn add(&mut self, latency: Duration, result: Result<(), Status>) {
        match result {
            Ok(()) => {
                let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(LONGEST);
                self.latencies.saturating_record(nanoseconds);
            }
            Err(status) => *self.failures.entry(status.code().into()).or_default() += 1,
        }
    }

    /// Adds those of another, which were made at the same time or in another round.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.latencies.add(&other.latencies)?;
        for (code, count) in &other.failures {
            *self.failures.entry(*code).or_default() += count;
        }
        Ok(())
    }
}

/// Makes calls over these connections for so long.
pub async fn run(
    clients: &[Client],
    world: &Arc<World>,
    scenario: Scenario,
    pace: Pace,
    duration: Duration,
) -> Result<Tally> {
    let begun = Instant::now();
    let mut tally = match pace {
        Pace::InFlight(calls) => {
            closed(clients, world, scenario, calls.into(), begun + duration).await?
        }
        Pace::Rate(rate) => {
            let (clients, world) = (clients.to_vec(), world.clone());
            // On the thread that makes the calls.
            tokio::spawn(open(clients, world, scenario, rate, duration)).await??
        }
    };
    tally.elapsed = begun.elapsed();
    Ok(tally)
}

async fn closed(
    clients: &[Client],
    world: &Arc<World>,
    scenario: Scenario,
    in_flight: usize,
    until: Instant,
) -> Result<Tally> {
    let mut workers = JoinSet::new();
    for number in 0..clients.len() * in_flight {
        let (mut client, world) = (clients[number % clients.len()].clone(), world.clone());
        let mut tally = Tally::new()?;
        workers.spawn(async move {
            loop {
                let begun = Instant::now();
                if begun >= until {
                    return tally;
                }
                let result = world.call(scenario, &mut client, number).await;
                tally.add(begun.elapsed(), result);
            }
        });
    }
    let mut all = Tally::new()?;
    for tally in workers.join_all().await {
        all.merge(&tally)?;
    }
    Ok(all)
}

async fn open(
    clients: Vec<Client>,
    world: Arc<World>,
    scenario: Scenario,
    rate: f64,
    duration: Duration,
) -> Result<Tally> {
    let mut tally = Tally::new()?;
    let timer = Timer::new()?;
    let mut calls = JoinSet::new();
    let begun = Instant::now();
    for number in 0_u32.. {
        let after = Duration::from_secs_f64(f64::from(number) / rate);
        if after >= duration {
            break;
        }
        let intended = begun + after;
        timer.wait_until(intended).await?;
        let number = number as usize;
        let (mut client, world) = (clients[number % clients.len()].clone(), world.clone());
        calls.spawn(async move {
            let result = world.call(scenario, &mut client, number).await;
            (intended.elapsed(), result)
        });
        while let Some(ended) = calls.try_join_next() {
            let (latency, result) = ended?;
            tally.add(latency, result);
        }
        if calls.len() > MAX_UNDER_WAY {
            return Err(format!("{rate:.0} calls a second are more than are answered").into());
        }
    }
    for (latency, result) in calls.join_all().await {
        tally.add(latency, result);
    }
    Ok(tally)
}

/// A timer of the system, which knows microseconds; tokio's knows milliseconds, longer than
/// a call takes.
struct Timer(AsyncFd<Descriptor>);

struct Descriptor(TimerFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Timer {
    fn new() -> Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        #[expect(deprecated, reason = "its successor is unsafe; the descriptor never changes here")]
        let timer = AsyncFd::new(Descriptor(timer))?;
        Ok(Self(timer))
    }

    async fn wait_until(&self, instant: Instant) -> Result<()> {
        let left = instant.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let timer = &self.0.get_ref().0;
        timer.set(Expiration::OneShot(TimeSpec::from(left)), TimerSetTimeFlags::empty())?;
        let mut ready = self.0.readable().await?;
        timer.wait()?;
        ready.clear_ready();
        Ok(())
    }
}
