//! Measures fast-zero next to the floor, in turns: see `docs/performance.md`.
//!
//! # Layout
//! - `arguments`: the command line
//! - `process`, `postgres`: what is started, and what it takes of the machine
//! - `fill`: the rows
//! - `client`, `scenario`, `load`: calls, which they are, and how they come
//! - `floor`, `pgbench`, `sql`: what the service is compared with
//! - `measure`: one measurement
//! - `parts`: which measurements there are, and the figures that come of them
//! - `report`, `plot`: what is told
//!
//! Everything is on this machine and on the loopback interface, and ends with this process:
//! servers are killed by the system when it ends in whatever way, the private PostgreSQL
//! ends with its lifeline.

mod arguments;
mod client;
mod fill;
mod floor;
mod load;
mod measure;
mod parts;
mod pgbench;
mod plot;
mod postgres;
mod process;
mod report;
mod scenario;
mod sql;

use std::{
    fmt::Write as _,
    fs,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use fast_zero::{shutdown::Shutdown, types::error_chain::BoxError as Cause};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Builder;

use arguments::{Arguments, Internal, Part, Settings};
use fill::Fill;
use measure::{SMALL, Servers, Site, check_answers};
use parts::Run;
use pgbench::Pgbench;
use postgres::{Folder, Postgres};
use report::Report;

type Result<T, E = Cause> = std::result::Result<T, E>;

/// What `--quick` makes of the arguments.
const QUICK_TODOS: u32 = 20_000;
const QUICK_USERS: u32 = 200;
const QUICK_DURATION: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.internal {
        Some(Internal::Leashed { parent, command }) => {
            Err(process::become_leashed(parent, &command))
        }
        Some(Internal::Floor(settings)) => run_floor(&settings),
        None => run_bench(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// On a runtime like the service's.
fn run_floor(settings: &Settings) -> Result<()> {
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(floor::serve(&settings.config))
}

/// On half of the machine: the servers and PostgreSQL need the rest.
fn run_bench(arguments: &Arguments) -> Result<()> {
    if cfg!(debug_assertions) {
        return Err("without optimisation there is nothing to measure: cargo run --release".into());
    }
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, files, files)?;
    let threads = thread::available_parallelism()?.get().div_ceil(2);
    let runtime = Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
    runtime.block_on(async {
        let shutdown = Shutdown::on_signals()?;
        tokio::select! {
            result = bench(arguments, &shutdown) => result,
            () = shutdown.forced.cancelled() => Err("stopped at once".into()),
        }
    })
}

/// From the building of the service to its end, whatever comes of the measurements.
async fn bench(arguments: &Arguments, shutdown: &Shutdown) -> Result<()> {
    let binary = match &arguments.server {
        Some(binary) => fs::canonicalize(binary)?,
        None => process::build().await?,
    };
    let folder = Folder::make()?;
    let postgres = Postgres::open(arguments.postgres.as_deref(), &binary, folder.path()).await?;
    let servers = Servers::new(binary, folder.path().to_owned());
    let measured = tokio::select! {
        measured = measure_all(arguments, &servers, &postgres) => measured,
        () = shutdown.requested.cancelled() => Err("stopped".into()),
    };
    postgres.close().await;
    let (report, text) = measured?;
    fs::create_dir_all(&arguments.output)?;
    fs::write(arguments.output.join("report.md"), &text)?;
    plot::draw(&report, &arguments.output.join("plot.svg"))?;
    println!("{text}");
    let failures = report.failures();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\nbench: ").into()) }
}

async fn measure_all(
    arguments: &Arguments,
    servers: &Servers,
    postgres: &Postgres,
) -> Result<(Report, String)> {
    let quick = arguments.quick;
    let rounds = if quick { 1 } else { arguments.rounds };
    let fill = Fill {
        users: if quick { QUICK_USERS } else { arguments.users },
        todos: if quick { QUICK_TODOS } else { arguments.todos },
    };
    let duration =
        if quick { QUICK_DURATION } else { Duration::from_secs(arguments.seconds.into()) };
    let wanted = |part: &Part| arguments.only.is_empty() || arguments.only.contains(part);
    let parts: Vec<_> = Part::value_variants().iter().copied().filter(wanted).collect();
    let pgbench = Pgbench::find(&servers.folder);
    if pgbench.is_none() {
        progress("pgbench is not on the PATH: without it (Debian: apt-get install postgresql)");
    }

    progress(&format!("filling with {} to-dos", fill.todos));
    let (large, walks) = (postgres.create("large").await?, parts.contains(&Part::Pages));
    let site = Site::prepare(servers, large, fill, walks).await?;
    let mut small = None;
    if parts.contains(&Part::Growth) {
        let database = postgres.create("small").await?;
        small = Some(Site::prepare(servers, database, SMALL, false).await?);
    }
    check_answers(servers, &site).await?;

    let settings = Settings::try_parse_from(["bench"])?;
    let mut run = Run {
        servers,
        postgres,
        pgbench: pgbench.as_ref(),
        site: &site,
        small: small.as_ref(),
        config: &settings.config,
        connections: arguments.connections,
        in_flight: arguments.in_flight,
        duration,
        report: Report::default(),
    };
    let begun = Instant::now();
    for round in 1..=rounds {
        for part in &parts {
            progress(&format!("round {round} of {rounds}: {}", name_of(*part)));
            run.part(*part).await?;
        }
    }
    let mut text = heading(&run, rounds, begun.elapsed());
    write!(text, "{}", run.report)?;
    Ok((run.report, text))
}

fn progress(what: &str) {
    eprintln!("bench: {what}");
}

fn name_of(part: Part) -> String {
    part.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// On what it was measured.
fn heading(run: &Run<'_>, rounds: u16, took: Duration) -> String {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = thread::available_parallelism().map_or(0, usize::from);
    let (model, postgres) = (model.map_or("unknown", |(_, model)| model), run.postgres);
    let kind = if postgres.is_private() { "private" } else { "of DATABASE_URL" };
    let mut text = format!(
        "{model}, {cores} cores shared by callers, server and PostgreSQL; PostgreSQL {} ({kind}); \
         {} connections of the servers to it; {rounds} rounds of {:.1} s each, {:.0} s in all.\n",
        postgres.version,
        run.config.database_max_connections,
        run.duration.as_secs_f64(),
        took.as_secs_f64(),
    );
    if run.pgbench.is_none() {
        text.push_str("\npgbench was not there, so nothing is compared with it.\n");
    }
    text.push('\n');
    text
}
