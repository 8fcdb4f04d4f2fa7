//! Load generation: calls in a closed loop or in an open loop, and their latencies.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use tokio::task::JoinSet;
use tonic::Status;

use crate::{client::Client, error::Result, fixtures::Fixtures, scenario::Scenario, timer::Timer};

/// The highest latency that the histogram distinguishes: one minute.
const MAX_LATENCY_NS: u64 = 60_000_000_000;
/// The precision of the histogram.
const SIGNIFICANT_DIGITS: u8 = 3;

/// The number of open-loop calls in flight at which a run fails: the rate is far above
/// what the server can process.
const MAX_IN_FLIGHT: usize = 10_000;

/// When the calls of a run start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LoadModel {
    /// A call starts when the previous one ends, so the number of calls in flight on each
    /// connection is constant. Finds the maximum rate. Its latencies omit the time that
    /// independent clients would wait (coordinated omission).
    ClosedLoop { in_flight: u16 },
    /// Calls start at a constant rate, in calls per second. A latency counts from the
    /// scheduled start of the call, so a stall delays all calls scheduled during it.
    OpenLoop { rate: f64 },
}

/// The results of calls.
#[derive(Clone, Debug)]
pub struct CallStats {
    /// The latencies of successful calls, in nanoseconds.
    pub latencies: Histogram<u64>,
    /// The number of failed calls by gRPC status code.
    pub failures: BTreeMap<i32, u64>,
    /// From the start of the first call to the end of the last one.
    pub elapsed: Duration,
}

impl CallStats {
    pub fn new() -> Result<Self> {
        let (latencies, failures) = (latency_histogram()?, BTreeMap::new());
        Ok(Self { latencies, failures, elapsed: Duration::ZERO })
    }

    /// Returns the number of successful calls per second.
    #[expect(clippy::cast_precision_loss, reason = "far fewer than 2^53 calls")]
    pub fn rate(&self) -> f64 {
        self.latencies.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// Returns the number of all calls, failed calls included.
    pub fn calls(&self) -> u64 {
        self.latencies.len() + self.failures.values().sum::<u64>()
    }

    fn record(&mut self, latency: Duration, result: Result<(), Status>) {
        match result {
            Ok(()) => record_latency(&mut self.latencies, latency),
            Err(status) => *self.failures.entry(status.code().into()).or_default() += 1,
        }
    }

    /// Adds the latencies and failures of another run. Does not change `elapsed`.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        self.latencies.add(&other.latencies)?;
        for (code, count) in &other.failures {
            *self.failures.entry(*code).or_default() += count;
        }
        Ok(())
    }
}

/// Returns an empty histogram of latencies in nanoseconds.
pub fn latency_histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_max(MAX_LATENCY_NS, SIGNIFICANT_DIGITS)?)
}

pub fn record_latency(latencies: &mut Histogram<u64>, latency: Duration) {
    let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(MAX_LATENCY_NS);
    latencies.saturating_record(nanoseconds);
}

/// Returns a quantile of latencies, in seconds.
#[expect(clippy::cast_precision_loss, reason = "far less than 2^53 ns")]
pub fn quantile_seconds(latencies: &Histogram<u64>, quantile: f64) -> f64 {
    latencies.value_at_quantile(quantile) as f64 / 1e9
}

/// Makes calls on the connections of all clients for the duration.
pub async fn run(
    clients: &[Client],
    fixtures: &Arc<Fixtures>,
    scenario: Scenario,
    load: LoadModel,
    duration: Duration,
) -> Result<CallStats> {
    match load {
        LoadModel::ClosedLoop { in_flight } => {
            run_closed_loop(clients, fixtures, scenario, in_flight.into(), duration).await
        }
        LoadModel::OpenLoop { rate } => {
            let (clients, fixtures) = (clients.to_vec(), fixtures.clone());
            let call = move |number: usize, _| {
                let (mut client, fixtures) =
                    (clients[number % clients.len()].clone(), fixtures.clone());
                async move { scenario.call(&fixtures, &mut client, number).await }
            };
            run_open_loop(rate, duration, call).await
        }
    }
}

async fn run_closed_loop(
    clients: &[Client],
    fixtures: &Arc<Fixtures>,
    scenario: Scenario,
    in_flight: usize,
    duration: Duration,
) -> Result<CallStats> {
    let (start, end) = (Instant::now(), Instant::now() + duration);
    let mut workers = JoinSet::new();
    for number in 0..clients.len() * in_flight {
        let (mut client, fixtures) = (clients[number % clients.len()].clone(), fixtures.clone());
        let mut stats = CallStats::new()?;
        workers.spawn(async move {
            loop {
                let started_at = Instant::now();
                if started_at >= end {
                    return stats;
                }
                let result = scenario.call(&fixtures, &mut client, number).await;
                stats.record(started_at.elapsed(), result);
            }
        });
    }
    let mut total = CallStats::new()?;
    for stats in workers.join_all().await {
        total.merge(&stats)?;
    }
    total.elapsed = start.elapsed();
    Ok(total)
}

/// Makes calls at a constant rate, in calls per second. `call` makes one, given its number and
/// its scheduled start.
pub async fn run_open_loop<F>(
    rate: f64,
    duration: Duration,
    call: impl FnMut(usize, Instant) -> F + Send + 'static,
) -> Result<CallStats>
where
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    // A task, so that the timer runs on a worker thread of the runtime like the calls, not on
    // the main thread.
    tokio::spawn(make_calls_at_rate(rate, duration, call)).await?
}

async fn make_calls_at_rate<F>(
    rate: f64,
    duration: Duration,
    mut call: impl FnMut(usize, Instant) -> F,
) -> Result<CallStats>
where
    F: Future<Output = Result<(), Status>> + Send + 'static,
{
    let mut stats = CallStats::new()?;
    let timer = Timer::new()?;
    let mut calls = JoinSet::new();
    let started_at = Instant::now();
    for number in 0_u32.. {
        let offset = Duration::from_secs_f64(f64::from(number) / rate);
        if offset >= duration {
            break;
        }
        let scheduled_at = started_at + offset;
        timer.wait_until(scheduled_at).await?;
        let call = call(number as usize, scheduled_at);
        calls.spawn(async move {
            let result = call.await;
            (scheduled_at.elapsed(), result)
        });
        while let Some(call) = calls.try_join_next() {
            let (latency, result) = call?;
            stats.record(latency, result);
        }
        if calls.len() > MAX_IN_FLIGHT {
            return Err(format!("the server does not sustain {rate:.0} calls/s").into());
        }
    }
    for (latency, result) in calls.join_all().await {
        stats.record(latency, result);
    }
    stats.elapsed = started_at.elapsed();
    Ok(stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_calls_count_as_calls_but_not_for_the_rate() {
        let mut stats = CallStats::new().expect("a histogram");
        stats.record(Duration::from_millis(1), Ok(()));
        stats.record(Duration::from_millis(1), Err(Status::internal("")));
        let mut total = CallStats::new().expect("a histogram");
        total.merge(&stats).expect("mergeable");
        total.merge(&stats).expect("mergeable");
        total.elapsed = Duration::from_millis(500);
        assert_eq!(total.calls(), 4);
        assert!((total.rate() - 4.0).abs() < f64::EPSILON);
        assert_eq!(total.failures, BTreeMap::from([(tonic::Code::Internal.into(), 2)]));
    }
}
