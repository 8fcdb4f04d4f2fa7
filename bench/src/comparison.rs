//! The metrics that compare the measurements of one round.

use std::time::{Duration, Instant};

use argon2::{Algorithm, Argon2, Block, Params, Version};

use crate::{
    error::Result,
    measure::Measurement,
    pgbench::CLIENTS,
    report::{Report, Threshold, Unit},
    row::mebibytes,
    scenario::Scenario,
};

/// A change of rate or CPU time by up to 3 % against the previous binary is tolerated.
const MIN_RATE_RATIO: f64 = 0.97;
const MAX_CPU_RATIO: f64 = 1.03;
const MAX_MEMORY_RATIO: f64 = 1.0;

/// The number of password hashes that are timed.
const HASH_COUNT: u32 = 10;

/// The measurements of one round of a scenario.
pub struct Round {
    pub service: Measurement,
    /// The binary of `--against`.
    pub previous: Option<Measurement>,
    /// `None` if the baseline does not implement the scenario.
    pub baseline: Option<Measurement>,
    /// Statements per second. `None` if the scenario is not a single statement.
    pub pgbench: Option<f64>,
    /// The service in an open loop at half its maximum rate.
    pub half_rate: Measurement,
}

impl Round {
    /// Adds the metrics of this round.
    pub fn report(&self, report: &mut Report, hashing_threads: u16) -> Result<()> {
        let scenario = self.service.config.scenario;
        if let Some(baseline) = &self.baseline {
            compare_with_baseline(report, &self.service, baseline);
        }
        if let Some(previous) = &self.previous {
            compare_with_previous(report, &self.service, previous);
        }
        let rate = self.service.stats.rate();
        match (scenario, self.pgbench) {
            (Scenario::Get, _) => {
                let name = "p99 ÷ p50 of GetTodo at half the maximum rate";
                let ratio = self.half_rate.latency(0.99) / self.half_rate.latency(0.5);
                report.add_metric(name, Threshold::AtMost(3.0), Unit::Ratio, ratio);
            }
            (Scenario::Create, Some(pgbench)) => {
                let name = format!("rate of CreateTodo with {CLIENTS} writers ÷ pgbench");
                report.add_metric(&name, Threshold::AtLeast(1.0), Unit::Ratio, rate / pgbench);
            }
            (Scenario::Login, _) => {
                let hash = hash_duration()?.as_secs_f64();
                let max_rate = f64::from(hashing_threads) / hash;
                let name = "rate of Login ÷ (hashing threads ÷ duration of one hash)";
                report.add_metric(name, Threshold::AtLeast(0.9), Unit::Ratio, rate / max_rate);
                let name = "duration of one password hash";
                report.add_metric(name, Threshold::None, Unit::Milliseconds, hash);
            }
            _ => {}
        }
        Ok(())
    }
}

fn compare_with_baseline(report: &mut Report, service: &Measurement, baseline: &Measurement) {
    let scenario = service.config.scenario;
    let (rate_threshold, cpu_threshold) = match scenario {
        Scenario::Get => (Threshold::AtLeast(1.5), Threshold::AtMost(0.7)),
        Scenario::List | Scenario::Update => (Threshold::AtLeast(0.9), Threshold::None),
        _ => (Threshold::None, Threshold::None),
    };
    let ratio = service.stats.rate() / baseline.stats.rate();
    let name = format!("rate of {scenario} ÷ baseline");
    report.add_metric(&name, rate_threshold, Unit::Ratio, ratio);
    if let Some((service, baseline)) = service.cpu_per_call().zip(baseline.cpu_per_call()) {
        let name = format!("CPU of {scenario} ÷ baseline");
        report.add_metric(&name, cpu_threshold, Unit::Ratio, service / baseline);
    }
}

/// Adds the metrics that compare two measurements with one call in flight.
pub fn compare_sequential(report: &mut Report, service: &Measurement, previous: &Measurement) {
    let ratio = service.stats.rate() / previous.stats.rate();
    let name = "rate of GetTodo with one call in flight ÷ previous";
    report.add_metric(name, Threshold::AtLeast(MIN_RATE_RATIO), Unit::Ratio, ratio);
    if let Some((service, previous)) = service.cpu_per_call().zip(previous.cpu_per_call()) {
        let name = "CPU of GetTodo with one call in flight ÷ previous";
        let threshold = Threshold::AtMost(MAX_CPU_RATIO);
        report.add_metric(name, threshold, Unit::Ratio, service / previous);
    }
}

fn compare_with_previous(report: &mut Report, service: &Measurement, previous: &Measurement) {
    let scenario = service.config.scenario;
    let ratio = service.stats.rate() / previous.stats.rate();
    let name = format!("rate of {scenario} ÷ previous");
    report.add_metric(&name, Threshold::AtLeast(MIN_RATE_RATIO), Unit::Ratio, ratio);
    if let Some((service, previous)) = service.cpu_per_call().zip(previous.cpu_per_call()) {
        let name = format!("CPU of {scenario} ÷ previous");
        let threshold = Threshold::AtMost(MAX_CPU_RATIO);
        report.add_metric(&name, threshold, Unit::Ratio, service / previous);
    }
    let ratio = mebibytes(service.resident_bytes) / mebibytes(previous.resident_bytes);
    let name = format!("memory of {scenario} ÷ previous");
    report.add_metric(&name, Threshold::AtMost(MAX_MEMORY_RATIO), Unit::Ratio, ratio);
}

/// Returns the duration of one password hash on an otherwise idle machine, without the
/// allocation of its memory.
fn hash_duration() -> Result<Duration> {
    // The parameters of the service.
    let params = Params::DEFAULT;
    let mut memory = vec![Block::default(); params.block_count()];
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let mut hash = || {
        let mut output = [0; 32];
        argon2
            .hash_password_into_with_memory(b"a password", &[1; 16], &mut output, &mut memory)
            .map_err(|error| error.to_string())
    };
    // The first hash is not timed, because it faults the memory in.
    hash()?;
    let started_at = Instant::now();
    for _ in 0..HASH_COUNT {
        hash()?;
    }
    Ok(started_at.elapsed() / HASH_COUNT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{launcher::Target, measure::tests::measurement};

    fn round(scenario: Scenario, rate: u32, cpu: u64, mebibytes: u64) -> Round {
        let measurement = |target, rate, cpu, mebibytes: u64| {
            measurement((scenario, target), rate, Duration::from_micros(cpu), mebibytes << 20)
        };
        let service = measurement(Target::Service, rate, cpu, mebibytes);
        Round {
            half_rate: service.clone(),
            service,
            previous: Some(measurement(Target::Previous, 1_000, 100, 20)),
            baseline: Some(measurement(Target::Baseline, 500, 200, 10)),
            pgbench: None,
        }
    }

    #[test]
    fn the_report_has_the_ratios_to_the_previous_binary() {
        for scenario in [Scenario::Get, Scenario::List, Scenario::Create, Scenario::Update] {
            let mut report = Report::default();
            for (rate, cpu, mebibytes) in [(1_100, 90, 20), (900, 98, 18), (990, 102, 22)] {
                let round = round(scenario, rate, cpu, mebibytes);
                round.report(&mut report, 1).expect("mergeable");
            }
            let text = report.to_string();
            for line in [
                format!("| rate of {scenario} ÷ previous | ≥ 0.97 | 0.99 | 0.90 | 1.10 |\n"),
                format!("| CPU of {scenario} ÷ previous | ≤ 1.03 | 0.98 | 0.90 | 1.02 |\n"),
                format!("| memory of {scenario} ÷ previous | ≤ 1.00 | 1.00 | 0.90 | 1.10 |\n"),
                format!("rate of {scenario} ÷ baseline"),
                format!("CPU of {scenario} ÷ baseline"),
            ] {
                assert!(text.contains(&line), "{line}\n{text}");
            }
        }
    }

    #[test]
    fn there_are_no_ratios_without_a_previous_binary() {
        let mut report = Report::default();
        let round = Round { previous: None, ..round(Scenario::Get, 1_000, 100, 20) };
        round.report(&mut report, 1).expect("mergeable");
        assert!(!report.to_string().contains("previous"));
    }
}
