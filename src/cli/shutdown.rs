//! The signals that stop the process.

use std::{io, process::ExitCode};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The requests of SIGINT and SIGTERM.
#[derive(Clone, Debug, Default)]
pub(super) struct Shutdown {
    /// Cancelled by the first signal: drain.
    pub(super) requested: CancellationToken,
    /// Cancelled by the second signal: stop at once.
    pub(super) forced: CancellationToken,
}

impl Shutdown {
    /// Listens for the signals from now on.
    pub(super) fn on_signals() -> io::Result<Self> {
        let mut signals = Signals::listen()?;
        let shutdown = Self::default();
        let Self { requested, forced } = shutdown.clone();
        tokio::spawn(async move {
            for token in [requested, forced] {
                let StopSignal { name, .. } = signals.next().await;
                tracing::info!(signal = name, "shutting down");
                token.cancel();
            }
        });
        Ok(shutdown)
    }
}

/// SIGINT and SIGTERM. As PID 1 of a container, a process ignores them unless it listens.
#[derive(Debug)]
pub(super) struct Signals {
    interrupts: Signal,
    terminations: Signal,
}

/// A signal that was received.
#[derive(Clone, Copy, Debug)]
pub(super) struct StopSignal {
    pub(super) name: &'static str,
    number: u8,
}

impl StopSignal {
    /// Returns the exit code of a process that the signal ended, as shells report it.
    pub(super) fn exit_code(self) -> ExitCode {
        ExitCode::from(128 + self.number)
    }
}

impl Signals {
    /// Listens for the signals from now on.
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupts: signal(SignalKind::interrupt())?,
            terminations: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for the next signal.
    pub(super) async fn next(&mut self) -> StopSignal {
        tokio::select! {
            _ = self.interrupts.recv() => StopSignal { name: "SIGINT", number: 2 },
            _ = self.terminations.recv() => StopSignal { name: "SIGTERM", number: 15 },
        }
    }
}
