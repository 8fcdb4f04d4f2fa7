//! The report in Markdown: a table of metrics and a table of measurements.

use std::fmt;

use tonic::Code;

use crate::{
    error::Result,
    launcher::Target,
    measure::Measurement,
    pgbench::CLIENTS,
    row::{NO_VALUE, Row, RowKey, min_median_max},
    scenario::Scenario,
    seed::DatasetSize,
};

const METRICS_HEADER: &str = "\
| metric | threshold | median | min | max |
|---|---|---|---|---|
";

const ROWS_HEADER: &str = "\
| scenario | target | connections × in flight | todos | calls/s (min–max) \
| p50 ms | p99 ms | p99.9 ms | server CPU µs | PostgreSQL CPU µs | client CPU µs \
| statements | RSS MiB | other CPU |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
";

#[derive(Debug, Default)]
pub struct Report {
    pub rows: Vec<Row>,
    metrics: Vec<Metric>,
}

/// A number that each round yields once.
#[derive(Debug)]
struct Metric {
    name: String,
    threshold: Threshold,
    unit: Unit,
    values: Vec<f64>,
}

/// What the median of a metric should be. The report shows it; a miss does not fail the run.
#[derive(Clone, Copy, Debug)]
pub enum Threshold {
    AtLeast(f64),
    AtMost(f64),
    None,
}

/// The unit of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Ratio,
    /// A time in seconds, shown in milliseconds.
    Milliseconds,
    Mebibytes,
    Megabytes,
    /// CPU seconds per second.
    Cores,
    PerSecond,
}

impl Unit {
    fn format(self, value: f64) -> String {
        match self {
            Self::Ratio => format!("{value:.2}"),
            Self::Milliseconds => format!("{:.1} ms", value * 1e3),
            Self::Mebibytes => format!("{value:.1} MiB"),
            Self::Megabytes => format!("{value:.1} MB"),
            Self::Cores => format!("{value:.3} cores"),
            Self::PerSecond => format!("{value:.2} /s"),
        }
    }
}

impl Report {
    /// Adds a measurement to its row, and returns the row.
    pub fn add(&mut self, size: DatasetSize, measurement: &Measurement) -> Result<&mut Row> {
        let row = self.row(RowKey::new(measurement, size.todos));
        row.add(measurement)?;
        Ok(row)
    }

    /// Adds a rate of pgbench, and PostgreSQL's CPU seconds per statement.
    pub fn add_pgbench(
        &mut self,
        size: DatasetSize,
        scenario: Scenario,
        rate: f64,
        cpu: Option<f64>,
    ) {
        let key = RowKey {
            scenario,
            target: Target::Pgbench,
            connections: CLIENTS,
            in_flight: Some(1),
            todos: size.todos,
        };
        self.row(key).add_pgbench(rate, cpu);
    }

    fn row(&mut self, key: RowKey) -> &mut Row {
        let index = self.rows.iter().position(|row| row.key == key).unwrap_or_else(|| {
            self.rows.push(Row::new(key));
            self.rows.len() - 1
        });
        &mut self.rows[index]
    }

    /// Adds the value of a round to the metric with this name.
    pub fn add_metric(&mut self, name: &str, threshold: Threshold, unit: Unit, value: f64) {
        if let Some(metric) = self.metrics.iter_mut().find(|metric| metric.name == name) {
            metric.values.push(value);
        } else {
            let name = name.to_owned();
            self.metrics.push(Metric { name, threshold, unit, values: vec![value] });
        }
    }

    /// Describes the failed calls that fail the run.
    ///
    /// In an open loop, `RESOURCE_EXHAUSTED` does not fail the run, because a server may
    /// shed load. The report shows these calls, too.
    pub fn failures(&self) -> Vec<String> {
        self.failed_calls(|key, code| !(key.is_open_loop() && code == Code::ResourceExhausted))
    }

    fn failed_calls(&self, include: impl Fn(&RowKey, Code) -> bool) -> Vec<String> {
        let mut lines = Vec::new();
        for Row { key, stats, .. } in &self.rows {
            for (code, count) in stats.iter().flat_map(|stats| &stats.failures) {
                let code = Code::from_i32(*code);
                if include(key, code) {
                    lines.push(format!("{key}: {count} × {code:?}"));
                }
            }
        }
        lines
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(METRICS_HEADER)?;
        for Metric { name, threshold, unit, values } in &self.metrics {
            let Some(values) = min_median_max(values) else {
                continue;
            };
            let threshold = match *threshold {
                Threshold::AtLeast(bound) => format!("≥ {}", unit.format(bound)),
                Threshold::AtMost(bound) => format!("≤ {}", unit.format(bound)),
                Threshold::None => NO_VALUE.to_owned(),
            };
            let [min, median, max] = values.map(|value| unit.format(value));
            writeln!(formatter, "| {name} | {threshold} | {median} | {min} | {max} |")?;
        }
        formatter.write_str("\n")?;
        formatter.write_str(ROWS_HEADER)?;
        for row in &self.rows {
            writeln!(formatter, "{row}")?;
        }
        for line in self.failed_calls(|_, _| true) {
            writeln!(formatter, "\nFailed calls: {line}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::Status;

    use super::*;
    use crate::{load::LoadModel, measure::tests::measurement};

    const SIZE: DatasetSize = DatasetSize { users: 200, todos: 20_000 };

    #[test]
    fn a_row_has_the_measurements_of_all_rounds() {
        let mut report = Report::default();
        for (rate, cpu) in [(900, 40), (1_000, 20), (1_200, 30)] {
            let target = (Scenario::Get, Target::Service);
            let round = measurement(target, rate, Duration::from_micros(cpu), 20 << 20);
            report.add(SIZE, &round).expect("mergeable");
        }
        report.add_pgbench(SIZE, Scenario::Get, 5_000.0, None);
        let text = report.to_string();
        let rows: Vec<_> = text.lines().filter(|line| line.contains("GetTodo")).collect();
        assert_eq!(rows.len(), 2, "{text}");
        assert!(
            rows[0].starts_with("| GetTodo | fast-zero | 8 × 8 | 20000 | 1000 (900–1200) | 1.00 |")
        );
        assert!(rows[0].ends_with("| 15 | 15 | 0 | – | 20 | 0.00 |"), "{}", rows[0]);
        assert!(
            rows[1].starts_with("| GetTodo | pgbench | 16 × 1 | 20000 | 5000 (5000–5000) | – |")
        );
        let columns = |line: &str| line.matches('|').count();
        assert!(rows.iter().all(|row| columns(row) == columns(ROWS_HEADER) / 2));
    }

    #[test]
    fn only_load_shedding_in_an_open_loop_does_not_fail_the_run() {
        for (load, code, fails) in [
            (LoadModel::OpenLoop { rate: 1.0 }, Code::ResourceExhausted, false),
            (LoadModel::OpenLoop { rate: 1.0 }, Code::Unavailable, true),
            (LoadModel::ClosedLoop { in_flight: 1 }, Code::ResourceExhausted, true),
        ] {
            let target = (Scenario::Get, Target::Service);
            let mut round = measurement(target, 10, Duration::from_micros(1), 0);
            round.config.load = load;
            *round.stats.failures.entry(Status::new(code, "").code().into()).or_default() += 1;
            let mut report = Report::default();
            report.add(SIZE, &round).expect("mergeable");
            assert_eq!(!report.failures().is_empty(), fails, "{load:?}, {code:?}");
            assert!(report.to_string().contains("\nFailed calls: GetTodo, fast-zero, "));
        }
    }
}
