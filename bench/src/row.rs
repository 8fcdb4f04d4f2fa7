//! The rows of the report's table of measurements.

use std::fmt;

use crate::{
    error::Result,
    launcher::Target,
    load::{CallStats, LoadModel},
    measure::Measurement,
    scenario::Scenario,
};

/// What distinguishes the rows: a scenario, measured on a target under one load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowKey {
    pub scenario: Scenario,
    pub target: Target,
    pub connections: u16,
    /// The calls in flight on each connection, or `None` for an open loop.
    pub in_flight: Option<u16>,
    /// The number of todos in the table.
    pub todos: u32,
}

impl RowKey {
    pub fn new(measurement: &Measurement, todos: u32) -> Self {
        let config = measurement.config;
        let in_flight = match config.load {
            LoadModel::ClosedLoop { in_flight } => Some(in_flight),
            LoadModel::OpenLoop { .. } => None,
        };
        let (scenario, target, connections) = (config.scenario, config.target, config.connections);
        Self { scenario, target, connections, in_flight, todos }
    }

    pub fn is_open_loop(&self) -> bool {
        self.in_flight.is_none()
    }

    /// Returns the connections and the calls in flight on each.
    pub fn load(&self) -> String {
        match self.in_flight {
            Some(in_flight) => format!("{} × {in_flight}", self.connections),
            None => format!("{}, open loop", self.connections),
        }
    }
}

impl fmt::Display for RowKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}, {}, {}", self.scenario, self.target, self.load())
    }
}

/// The measurements of all rounds. Vectors have one value per round.
#[derive(Debug)]
pub struct Row {
    pub key: RowKey,
    /// Calls per second.
    rates: Vec<f64>,
    /// The calls of all rounds, or `None` for pgbench.
    pub stats: Option<CallStats>,
    /// Seconds per call.
    server_cpu: Vec<f64>,
    /// Seconds per call. Empty if PostgreSQL runs on another machine.
    postgres_cpu: Vec<f64>,
    /// Seconds per call.
    client_cpu: Vec<f64>,
    /// The average number of CPU cores that other processes used.
    other_cpu: Vec<f64>,
    /// SQL statements per call, measured once.
    pub statements: Option<f64>,
    resident_mebibytes: Vec<f64>,
}

impl Row {
    pub fn new(key: RowKey) -> Self {
        Self {
            key,
            rates: Vec::new(),
            stats: None,
            server_cpu: Vec::new(),
            postgres_cpu: Vec::new(),
            client_cpu: Vec::new(),
            other_cpu: Vec::new(),
            statements: None,
            resident_mebibytes: Vec::new(),
        }
    }

    /// Adds the measurement of a round.
    pub fn add(&mut self, measurement: &Measurement) -> Result<()> {
        let stats = &measurement.stats;
        match &mut self.stats {
            Some(total) => total.merge(stats)?,
            total => *total = Some(stats.clone()),
        }
        self.rates.push(stats.rate());
        self.server_cpu.push(measurement.per_call(measurement.server_cpu));
        self.postgres_cpu.extend(measurement.postgres_cpu.map(|cpu| measurement.per_call(cpu)));
        self.client_cpu.push(measurement.per_call(measurement.client_cpu));
        self.other_cpu.push(measurement.other_cpu.as_secs_f64() / stats.elapsed.as_secs_f64());
        self.resident_mebibytes.push(mebibytes(measurement.resident_bytes));
        Ok(())
    }

    /// Adds the rate of a round of pgbench, and PostgreSQL's CPU seconds per statement.
    pub fn add_pgbench(&mut self, rate: f64, cpu: Option<f64>) {
        self.rates.push(rate);
        self.postgres_cpu.extend(cpu);
    }

    /// Returns the minimum, the median and the maximum rate.
    pub fn rates(&self) -> Option<[f64; 3]> {
        min_median_max(&self.rates)
    }
}

/// The row in Markdown, with the columns of [`crate::report`].
impl fmt::Display for Row {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RowKey { scenario, target, todos, .. } = self.key;
        write!(formatter, "| {scenario} | {target} | {} | {todos}", self.key.load())?;
        match self.rates() {
            Some([min, median, max]) => {
                write!(formatter, " | {median:.0} ({min:.0}–{max:.0})")?;
            }
            None => write!(formatter, " | {NO_VALUE}")?,
        }
        for quantile in [0.5, 0.99, 0.999] {
            let latency = self.stats.as_ref().map(|stats| latency_ms(stats, quantile));
            write!(formatter, " | {}", or_no_value(latency, 2))?;
        }
        for cpu in [&self.server_cpu, &self.postgres_cpu, &self.client_cpu] {
            let microseconds = median(cpu).map(|seconds| seconds * 1e6);
            write!(formatter, " | {}", or_no_value(microseconds, 0))?;
        }
        write!(
            formatter,
            " | {} | {} | {} |",
            or_no_value(self.statements, 2),
            or_no_value(median(&self.resident_mebibytes), 0),
            or_no_value(median(&self.other_cpu), 2),
        )
    }
}

/// The content of a table cell without a value.
pub const NO_VALUE: &str = "–";

fn or_no_value(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| NO_VALUE.to_owned(), |value| format!("{value:.decimals$}"))
}

#[expect(clippy::cast_precision_loss, reason = "far less than 2^53 ns")]
fn latency_ms(stats: &CallStats, quantile: f64) -> f64 {
    stats.latencies.value_at_quantile(quantile) as f64 / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "far less than 2^53 bytes")]
pub fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}

fn median(values: &[f64]) -> Option<f64> {
    min_median_max(values).map(|[_, median, _]| median)
}

/// Returns the minimum, the median and the maximum, or `None` if there are no values.
pub fn min_median_max(values: &[f64]) -> Option<[f64; 3]> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = match sorted.len() {
        0 => return None,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    };
    Some([sorted[0], median, sorted[sorted.len() - 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_value() {
        assert_eq!(min_median_max(&[]), None);
        assert_eq!(min_median_max(&[3.0]), Some([3.0, 3.0, 3.0]));
        assert_eq!(min_median_max(&[3.0, 1.0]), Some([1.0, 2.0, 3.0]));
        assert_eq!(min_median_max(&[9.0, 1.0, 2.0]), Some([1.0, 2.0, 9.0]));
    }
}
