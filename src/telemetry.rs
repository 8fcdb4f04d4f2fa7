//! The log: what is written, and how. Each call's one line is written by [`crate::call`].

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::config::{Config, LogFormat};

/// Starts the log, on standard error. To be called once; later calls change nothing.
pub fn start(config: &Config) {
    let filter = EnvFilter::new(&config.rust_log);
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let pretty = match config.log_format {
        Some(format) => format == LogFormat::Pretty,
        None => io::stderr().is_terminal(),
    };
    let _ = if pretty {
        builder.with_ansi(io::stderr().is_terminal()).try_init()
    } else {
        builder.json().flatten_event(true).with_span_list(false).try_init()
    };
}
