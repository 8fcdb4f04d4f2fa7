//! Measures fast-zero and compares it with a baseline. See `docs/performance.md`.
//!
//! # Layout
//! Modules import only from the lines below their own.
//!
//! | modules | contain |
//! |---|---|
//! | `main` | the run, from the build of the service to the report |
//! | `runner`, `plot` | the benchmarks of a round, the picture of the report |
//! | `comparison`, `watch` | the metrics that compare measurements, a measurement with watches |
//! | `report` | the tables in Markdown |
//! | `row` | the rows of the table of measurements |
//! | `measure`, `pgbench`, `equivalence` | one measurement, pgbench, the check that all servers respond alike |
//! | `dataset`, `baseline`, `lag` | a seeded database, the server to compare with, the lags of watches |
//! | `load`, `launcher`, `arguments` | calls in a closed or open loop, the targets, the command line |
//! | `scenario`, `server`, `timer`, `shutdown` | the measured calls, a server process, a precise timer, signals |
//! | `fixtures` | callers and their todos |
//! | `client`, `requests` | a gRPC client, the request messages |
//! | `seed` | the rows of a database |
//! | `postgres` | the PostgreSQL server and its databases |
//! | `process`, `procfs`, `run_dir`, `sql` | child processes, `/proc`, the temporary directory, the SQL statements |
//! | `error` | the error type |
//!
//! All processes run on this machine, use the loopback interface and end with this process:
//! the kernel terminates the servers, and the embedded PostgreSQL stops when its lifeline
//! closes.

mod arguments;
mod baseline;
mod client;
mod comparison;
mod dataset;
mod equivalence;
mod error;
mod fixtures;
mod lag;
mod launcher;
mod load;
mod measure;
mod pgbench;
mod plot;
mod postgres;
mod process;
mod procfs;
mod report;
mod requests;
mod row;
mod run_dir;
mod runner;
mod scenario;
mod seed;
mod server;
mod shutdown;
mod sql;
mod timer;
mod watch;

use std::{
    fs,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Builder;

use arguments::{Arguments, Benchmark, InternalCommand, Settings};
use dataset::{Dataset, SMALL};
use equivalence::check_responses;
use error::Result;
use launcher::{Launcher, build_service};
use pgbench::Pgbench;
use postgres::Postgres;
use report::Report;
use run_dir::RunDir;
use runner::Runner;
use seed::DatasetSize;
use shutdown::Shutdown;

/// What `--quick` uses instead of the arguments.
const QUICK_SIZE: DatasetSize = DatasetSize { users: 200, todos: 20_000 };
const QUICK_DURATION: Duration = Duration::from_millis(300);
const QUICK_WATCHES: u32 = 50;

/// The watches of [`Benchmark::Watch`] on each replica, unless the database has fewer users.
const WATCHES: u32 = 1_000;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.internal {
        Some(InternalCommand::ExecWithParent { parent, command }) => {
            Err(process::exec_with_parent(parent, &command))
        }
        Some(InternalCommand::Baseline(settings)) => serve_baseline(&settings),
        None => run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Serves the baseline on a runtime with the same configuration as the service's.
fn serve_baseline(settings: &Settings) -> Result<()> {
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(baseline::serve(&settings.config))
}

/// Runs the benchmarks on a runtime with half of the cores, because the servers and
/// PostgreSQL need the others.
fn run(arguments: &Arguments) -> Result<()> {
    if cfg!(debug_assertions) {
        return Err("a debug build is not representative: use `cargo run --release`".into());
    }
    let (_, fd_limit) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, fd_limit, fd_limit)?;
    let threads = thread::available_parallelism()?.get().div_ceil(2);
    let runtime = Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(async {
        let shutdown = Shutdown::on_signals()?;
        tokio::select! {
            result = bench(arguments, &shutdown) => result,
            () = shutdown.forced() => Err("interrupted twice, exiting without cleanup".into()),
        }
    })
}

/// Starts PostgreSQL, measures, stops PostgreSQL and writes the report.
async fn bench(arguments: &Arguments, shutdown: &Shutdown) -> Result<()> {
    let service = match &arguments.server {
        Some(binary) => fs::canonicalize(binary)?,
        None => build_service().await?,
    };
    let previous = arguments.against.as_ref().map(fs::canonicalize).transpose()?;
    let run_dir = RunDir::create()?;
    let postgres = Postgres::open(arguments.postgres.as_deref(), &service, run_dir.path()).await?;
    let run_path = run_dir.path().to_owned();
    let launcher = Launcher::new(service, previous, arguments.against_hs256, run_path);
    let result = tokio::select! {
        result = measure_all(arguments, &launcher, &postgres) => result,
        () = shutdown.requested() => Err("interrupted".into()),
    };
    postgres.close().await;
    let (report, text) = result?;
    fs::create_dir_all(&arguments.output)?;
    fs::write(arguments.output.join("report.md"), &text)?;
    plot::draw(&report, &arguments.output.join("plot.svg"))?;
    println!("{text}");
    let failures = report.failures();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\nbench: ").into()) }
}

/// Runs all rounds, and returns the report and its text.
async fn measure_all(
    arguments: &Arguments,
    launcher: &Launcher,
    postgres: &Postgres,
) -> Result<(Report, String)> {
    let rounds = if arguments.quick { 1 } else { arguments.rounds };
    let duration = if arguments.quick {
        QUICK_DURATION
    } else {
        Duration::from_secs(arguments.seconds.into())
    };
    let benchmarks = selected_benchmarks(arguments);
    let pgbench = Pgbench::find(&launcher.run_dir);
    if pgbench.is_none() {
        print_progress(
            "pgbench is not on the PATH, skipping it (Debian: apt-get install postgresql)",
        );
    }
    let (large, small) = prepare_datasets(arguments, &benchmarks, launcher, postgres).await?;
    let settings = Settings::try_parse_from(["bench"])?;
    let mut runner = Runner {
        launcher,
        postgres,
        pgbench: pgbench.as_ref(),
        dataset: &large,
        small: small.as_ref(),
        config: &settings.config,
        connections: arguments.connections,
        in_flight: arguments.in_flight,
        duration,
        report: Report::default(),
    };
    let started_at = Instant::now();
    for round in 1..=rounds {
        for benchmark in &benchmarks {
            print_progress(&format!("round {round} of {rounds}: {}", name_of(*benchmark)));
            runner.run_benchmark(*benchmark, round).await?;
        }
    }
    let text = format!("{}\n{}", heading(&runner, rounds, started_at.elapsed()), runner.report);
    Ok((runner.report, text))
}

/// Returns the dataset of all benchmarks, and the small one if [`Benchmark::Growth`] needs it.
async fn prepare_datasets(
    arguments: &Arguments,
    benchmarks: &[Benchmark],
    launcher: &Launcher,
    postgres: &Postgres,
) -> Result<(Dataset, Option<Dataset>)> {
    let size = if arguments.quick {
        QUICK_SIZE
    } else {
        DatasetSize { users: arguments.users, todos: arguments.todos }
    };
    print_progress(&format!("seeding {} todos", size.todos));
    let with_deep_page = benchmarks.contains(&Benchmark::Pages);
    let database = postgres.create_database("large").await?;
    let watched = match (benchmarks.contains(&Benchmark::Watch), arguments.quick) {
        (false, _) => 0,
        (true, true) => QUICK_WATCHES,
        (true, false) => WATCHES.min(size.users),
    };
    let large = Dataset::prepare(launcher, database, size, with_deep_page, watched).await?;
    let mut small = None;
    if benchmarks.contains(&Benchmark::Growth) {
        let database = postgres.create_database("small").await?;
        small = Some(Dataset::prepare(launcher, database, SMALL, false, 0).await?);
    }
    print_progress("comparing the responses of all servers");
    check_responses(launcher, &large).await?;
    Ok((large, small))
}

fn selected_benchmarks(arguments: &Arguments) -> Vec<Benchmark> {
    let is_selected =
        |benchmark: &Benchmark| arguments.only.is_empty() || arguments.only.contains(benchmark);
    Benchmark::value_variants().iter().copied().filter(is_selected).collect()
}

fn print_progress(message: &str) {
    eprintln!("bench: {message}");
}

fn name_of(benchmark: Benchmark) -> String {
    benchmark.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Describes the machine and the run.
fn heading(runner: &Runner<'_>, rounds: u16, elapsed: Duration) -> String {
    let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu_info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown CPU", |(_, model)| model);
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let postgres = runner.postgres;
    let kind = if postgres.is_embedded() { "embedded" } else { "DATABASE_URL" };
    let mut text = format!(
        "{model}, {cores} cores for client, server and PostgreSQL; PostgreSQL {} ({kind}), {} \
         connections per server; rounds: {rounds}, {:.1} s per measurement, {:.0} s in total.\n",
        postgres.version,
        runner.config.limits.database_max_connections,
        runner.duration.as_secs_f64(),
        elapsed.as_secs_f64(),
    );
    text.push_str(
        "\nRatios are those of one round. CPU is the CPU time of server and PostgreSQL per call; \
         other CPU is the average number of cores that all other processes used.\n",
    );
    if runner.pgbench.is_none() {
        text.push_str("\npgbench was not found, so the report does not contain it.\n");
    }
    text
}
