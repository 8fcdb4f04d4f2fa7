//! SIGINT and SIGTERM: the first signal requests a graceful end, the second one forces it.

use std::io;

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// The number of signals that this process has received.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<u32>);

impl Shutdown {
    /// Starts to listen for the signals.
    pub fn on_signals() -> io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let (sender, shutdown) = Self::channel();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                sender.send_modify(|signals| *signals += 1);
            }
        });
        Ok(shutdown)
    }

    fn channel() -> (watch::Sender<u32>, Self) {
        let (sender, receiver) = watch::channel(0);
        (sender, Self(receiver))
    }

    /// Waits for the first signal.
    pub async fn requested(&self) {
        self.wait_for(1).await;
    }

    /// Waits for the second signal.
    pub async fn forced(&self) {
        self.wait_for(2).await;
    }

    async fn wait_for(&self, count: u32) {
        // The sender lives as long as the runtime, so an error means that the process exits.
        let _ = self.0.clone().wait_for(|signals| *signals >= count).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn the_first_signal_requests_and_the_second_one_forces_the_end() {
        let (sender, shutdown) = Shutdown::channel();
        let state = || {
            (
                shutdown.requested().now_or_never().is_some(),
                shutdown.forced().now_or_never().is_some(),
            )
        };
        assert_eq!(state(), (false, false));
        sender.send_replace(1);
        assert_eq!(state(), (true, false));
        sender.send_replace(2);
        assert_eq!(state(), (true, true));
    }
}
