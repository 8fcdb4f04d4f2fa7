//! Logging to standard error. [`crate::middleware`] writes the one line of each call.

mod json;
mod pretty;

use std::{
    fs::File,
    io::{self, BufWriter, IsTerminal},
    os::fd::AsFd,
    sync::OnceLock,
    thread,
    time::Duration,
};

use clap::ValueEnum;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt::Layer,
    layer::SubscriberExt,
    registry::Registry,
    util::SubscriberInitExt,
};

#[cfg(test)]
use {
    std::{io::Read, sync::Mutex},
    tracing_subscriber::fmt::{FormatEvent, FormatFields},
};

use self::{json::JsonFormat, pretty::PrettyFormat};

/// The maximum number of buffered lines, about 2 MiB at level INFO. If the reader of the log
/// stalls and the pipe is full, calls continue and further lines are dropped.
///
/// Test: `calls_do_not_wait_for_an_unread_log`.
const MAX_BUFFERED_LINES: usize = 4_096;

/// How long lines are collected before one write. A line that finds the log thread asleep has
/// to wake it, which takes longer than to format the line.
pub(crate) const BATCH_WINDOW: Duration = Duration::from_millis(5);

/// The format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people, with the time of day in UTC, and without the fields of a call that only
    /// programs read.
    Pretty,
    /// One JSON object per line.
    Json,
}

/// The module of sqlx that reads libpq's password file. It logs lines that it cannot parse, with
/// the password.
const PASSWORD_FILE_TARGET: &str = "sqlx_postgres::options::pgpass";

static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// Initializes logging to standard error. Call it once; later calls have no effect. Dropping
/// the guard writes the buffered lines.
#[must_use = "the log ends when it is dropped"]
pub fn init(targets: Targets, format: Option<LogFormat>) -> WorkerGuard {
    let targets = targets.with_target(PASSWORD_FILE_TARGET, LevelFilter::OFF);
    let is_terminal = io::stderr().is_terminal();
    let pretty = match format {
        Some(format) => format == LogFormat::Pretty,
        None => is_terminal,
    };
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(MAX_BUFFERED_LINES)
        .thread_name("log")
        .finish(BatchingWriter(BufWriter::new(dup_stderr())));
    let _ = DROPPED.set(writer.error_counter());
    let lines = Layer::new().with_writer(writer);
    let _ = if pretty {
        let lines = lines.fmt_fields(PrettyFormat).event_format(PrettyFormat);
        Registry::default().with(lines.with_ansi(is_terminal)).with(targets).try_init()
    } else {
        let lines = lines.fmt_fields(JsonFormat).event_format(JsonFormat);
        Registry::default().with(lines).with(targets).try_init()
    };
    guard
}

/// A writer that pauses for [`BATCH_WINDOW`] after each flush, so that lines are written in
/// batches.
struct BatchingWriter<W: io::Write>(BufWriter<W>);

impl<W: io::Write> io::Write for BatchingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        thread::sleep(BATCH_WINDOW);
        Ok(())
    }
}

/// Duplicates standard error. If its reader stalls, a blocked write of the log does not hold
/// the lock that a panic message needs.
fn dup_stderr() -> Box<dyn io::Write + Send> {
    match io::stderr().as_fd().try_clone_to_owned() {
        Ok(fd) => Box::new(File::from(fd)),
        Err(_) => Box::new(io::stderr()),
    }
}

/// Returns the number of lines dropped because the buffer was full.
#[must_use]
pub fn dropped_lines() -> usize {
    DROPPED.get().map_or(0, ErrorCounter::dropped_lines)
}

/// Runs `work`, and returns what it logs.
#[cfg(test)]
fn capture<N, E>(layer: Layer<Registry, N, E>, work: impl FnOnce()) -> String
where
    N: for<'writer> FormatFields<'writer> + Send + Sync + 'static,
    E: FormatEvent<Registry, N> + Send + Sync + 'static,
{
    let (mut reader, writer) = io::pipe().expect("a pipe");
    let log = Registry::default().with(layer.with_writer(Mutex::new(writer)));
    tracing::subscriber::with_default(log, work);
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("text");
    text
}
