//! The signals that stop the process.

use tokio::signal::unix::{SignalKind, signal};
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
    pub(super) fn on_signals() -> std::io::Result<Self> {
        let mut interrupts = signal(SignalKind::interrupt())?;
        let mut terminations = signal(SignalKind::terminate())?;
        let shutdown = Self::default();
        let Self { requested, forced } = shutdown.clone();
        tokio::spawn(async move {
            for token in [requested, forced] {
                let name = tokio::select! {
                    _ = interrupts.recv() => "SIGINT",
                    _ = terminations.recv() => "SIGTERM",
                };
                tracing::info!(signal = name, "shutting down");
                token.cancel();
            }
        });
        Ok(shutdown)
    }
}
