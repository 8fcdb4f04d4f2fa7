//! What is told: tables in Markdown.

use std::fmt::{self, Write};

use tonic::Code;

use crate::{
    Result,
    fill::Fill,
    load::{Pace, Tally},
    measure::{Contender, Sample},
    pgbench::CLIENTS,
    scenario::Scenario,
};

/// All that was measured.
#[derive(Debug, Default)]
pub struct Report {
    pub rows: Vec<Row>,
    figures: Vec<Figure>,
}

/// One scenario of one contender at one load, over all rounds.
#[derive(Debug)]
pub struct Row {
    scenario: Scenario,
    pub who: Who,
    load: Load,
    /// In the table.
    todos: u32,
    /// Calls a second, of each round.
    rates: Vec<f64>,
    /// All latencies; none are known of pgbench.
    pub tally: Option<Tally>,
    /// Seconds of a call, and whatever else is in each round.
    server_cpu: Vec<f64>,
    postgres_cpu: Vec<f64>,
    client_cpu: Vec<f64>,
    /// Cores that all else kept busy.
    others: Vec<f64>,
    /// Of a call.
    pub statements: Option<f64>,
    resident: Vec<f64>,
}

/// Whose row it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Service,
    Floor,
    Pgbench,
}

impl fmt::Display for Who {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Service => "fast-zero",
            Self::Floor => "floor",
            Self::Pgbench => "pgbench",
        })
    }
}

/// How calls came.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Load {
    /// Connections, and calls in flight on each.
    Closed(u16, u16),
    /// Half of the highest rate of the round, or a given rate.
    Open(u16),
}

/// A number of each round, and what it should be.
#[derive(Debug)]
struct Figure {
    name: String,
    goal: Goal,
    unit: Unit,
    values: Vec<f64>,
}

/// What a figure should be, in its basic unit.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
    None,
}

/// What a figure counts. Times are given in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Ratio,
    Milliseconds,
    Mebibytes,
    Megabytes,
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::Ratio => format!("{value:.2}"),
            Self::Milliseconds => format!("{:.1} ms", value * 1e3),
            Self::Mebibytes => format!("{value:.1} MiB"),
            Self::Megabytes => format!("{value:.1} MB"),
        }
    }
}

impl Report {
    /// Adds a measurement.
    pub fn add(&mut self, fill: Fill, sample: &Sample) -> Result<&mut Row> {
        let plan = sample.plan;
        let load = match plan.pace {
            Pace::InFlight(calls) => Load::Closed(plan.connections, calls),
            Pace::Rate(_) => Load::Open(plan.connections),
        };
        let who = match plan.contender {
            Contender::Service => Who::Service,
            Contender::Floor => Who::Floor,
        };
        let row = self.row(plan.scenario, who, load, fill);
        row.rates.push(sample.tally.rate());
        match &mut row.tally {
            Some(tally) => tally.merge(&sample.tally)?,
            tally => *tally = Some(sample.tally.clone()),
        }
        row.server_cpu.push(sample.per_call(sample.server_cpu));
        row.postgres_cpu.extend(sample.postgres_cpu.map(|cpu| sample.per_call(cpu)));
        row.client_cpu.push(sample.per_call(sample.client_cpu));
        row.others.push(sample.other_cpu.as_secs_f64() / sample.tally.elapsed.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "far less than 2^53")]
        row.resident.push(sample.resident as f64 / 1_048_576.0);
        Ok(row)
    }

    /// Adds what pgbench says.
    pub fn add_pgbench(&mut self, fill: Fill, scenario: Scenario, rate: f64, cpu: Option<f64>) {
        let row = self.row(scenario, Who::Pgbench, Load::Closed(CLIENTS, 1), fill);
        row.rates.push(rate);
        row.postgres_cpu.extend(cpu);
    }

    fn row(&mut self, scenario: Scenario, who: Who, load: Load, fill: Fill) -> &mut Row {
        let todos = fill.todos;
        let is_it = |row: &Row| {
            (row.scenario, row.who, row.load, row.todos) == (scenario, who, load, todos)
        };
        let at = self.rows.iter().position(is_it).unwrap_or_else(|| {
            self.rows.push(Row::new(scenario, who, load, todos));
            self.rows.len() - 1
        });
        &mut self.rows[at]
    }

    /// Adds a number of this round.
    pub fn figure(&mut self, name: &str, goal: Goal, unit: Unit, value: f64) {
        let known = self.figures.iter_mut().find(|figure| figure.name == name);
        if let Some(figure) = known {
            figure.values.push(value);
        } else {
            let name = name.to_owned();
            self.figures.push(Figure { name, goal, unit, values: vec![value] });
        }
    }

    /// Calls that failed. That one which comes at a rate is turned away when there is too
    /// much to do is no failure; it is told, though.
    pub fn failures(&self) -> Vec<String> {
        self.not_answered_well(|row, code| !(row.is_open() && code == Code::ResourceExhausted))
    }

    fn not_answered_well(&self, counts: impl Fn(&Row, Code) -> bool) -> Vec<String> {
        let mut lines = Vec::new();
        for row in &self.rows {
            for (code, count) in row.tally.iter().flat_map(|tally| &tally.failures) {
                let code = Code::from_i32(*code);
                if counts(row, code) {
                    let Row { scenario, who, load, .. } = row;
                    lines.push(format!("{scenario}, {who}, {load}: {count} × {code:?}"));
                }
            }
        }
        lines
    }
}

impl Row {
    fn new(scenario: Scenario, who: Who, load: Load, todos: u32) -> Self {
        Self {
            scenario,
            who,
            load,
            todos,
            rates: Vec::new(),
            tally: None,
            server_cpu: Vec::new(),
            postgres_cpu: Vec::new(),
            client_cpu: Vec::new(),
            others: Vec::new(),
            statements: None,
            resident: Vec::new(),
        }
    }

    /// For the plot: how it is called.
    pub fn name(&self) -> String {
        format!("{}, {}, {}", self.scenario, self.who, self.load)
    }

    pub fn is_open(&self) -> bool {
        matches!(self.load, Load::Open(_))
    }

    /// Whether calls came in the same way as those of another.
    pub fn is_like(&self, other: &Self) -> bool {
        (self.scenario, self.load) == (other.scenario, other.load)
    }

    /// The least, the middle and the highest rate.
    pub fn rates(&self) -> Option<[f64; 3]> {
        spread(&self.rates)
    }

    fn latency(&self, quantile: f64) -> String {
        let latencies = self.tally.as_ref().map(|tally| &tally.latencies);
        #[expect(clippy::cast_precision_loss, reason = "far less than 2^53")]
        let latency = latencies.map(|all| all.value_at_quantile(quantile) as f64 / 1e6);
        latency.map_or_else(none, |milliseconds| format!("{milliseconds:.2}"))
    }
}

impl fmt::Display for Load {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed(connections, calls) => write!(formatter, "{connections} × {calls}"),
            Self::Open(connections) => write!(formatter, "{connections}, at a rate"),
        }
    }
}

/// The tables.
impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .write_str("| figure | to reach | median | least | most |\n|---|---|---|---|---|\n")?;
        for Figure { name, goal, unit, values } in &self.figures {
            let Some([least, median, most]) = spread(values) else {
                continue;
            };
            let goal = match *goal {
                Goal::AtLeast(bound) => format!("≥ {}", unit.show(bound)),
                Goal::AtMost(bound) => format!("≤ {}", unit.show(bound)),
                Goal::None => none(),
            };
            let [least, median, most] = [least, median, most].map(|value| unit.show(value));
            writeln!(formatter, "| {name} | {goal} | {median} | {least} | {most} |")?;
        }
        formatter.write_str(
            "\n| calls | of | connections × calls | to-dos | calls/s (least–most) \
             | p50 ms | p99 ms | p99.9 ms | server µs | PostgreSQL µs | callers µs | statements | MiB \
             | others' cores |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
        )?;
        for row in &self.rows {
            let Some([least, median, most]) = row.rates() else {
                continue;
            };
            let mut line = format!(
                "| {} | {} | {} | {} | {median:.0} ({least:.0}–{most:.0})",
                row.scenario, row.who, row.load, row.todos
            );
            for quantile in [0.5, 0.99, 0.999] {
                write!(line, " | {}", row.latency(quantile))?;
            }
            for cpu in [&row.server_cpu, &row.postgres_cpu, &row.client_cpu] {
                write!(line, " | {}", middle(cpu, |seconds| format!("{:.0}", seconds * 1e6)))?;
            }
            let statements = row.statements.map_or_else(none, |count| format!("{count:.2}"));
            let resident = middle(&row.resident, |mebibytes| format!("{mebibytes:.0}"));
            let others = middle(&row.others, |cores| format!("{cores:.2}"));
            writeln!(formatter, "{line} | {statements} | {resident} | {others} |")?;
        }
        for line in self.not_answered_well(|_, _| true) {
            writeln!(formatter, "\nNot answered well: {line}")?;
        }
        Ok(())
    }
}

fn none() -> String {
    "–".to_owned()
}

fn middle(values: &[f64], show: impl Fn(f64) -> String) -> String {
    spread(values).map_or_else(none, |[_, median, _]| show(median))
}

/// The least, the median and the most.
fn spread(values: &[f64]) -> Option<[f64; 3]> {
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
    fn the_median_is_in_the_middle() {
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[3.0]), Some([3.0, 3.0, 3.0]));
        assert_eq!(spread(&[3.0, 1.0]), Some([1.0, 2.0, 3.0]));
        assert_eq!(spread(&[9.0, 1.0, 2.0]), Some([1.0, 2.0, 9.0]));
    }
}
