//! The signals that stop the process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What SIGINT and SIGTERM ask for.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled by the first signal: finish what is under way.
    pub requested: CancellationToken,
    /// Cancelled by the second one: stop at once.
    pub forced: CancellationToken,
}

impl Shutdown {
    /// Listens for the signals from now on.
    pub fn on_signals() -> std::io::Result<Self> {
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
                tracing::info!(signal = name, "stopping");
                token.cancel();
            }
        });
        Ok(shutdown)
    }
}
