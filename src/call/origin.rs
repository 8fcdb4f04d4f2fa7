//! The connection over which calls come.

use std::net::IpAddr;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// The connection over which a call comes.
#[derive(Debug)]
pub struct Origin {
    pub(super) ip: IpAddr,
    pub(super) calls: TaskTracker,
    /// Cancelled when the connection is told to end: streams do.
    pub(super) ending: CancellationToken,
    /// Cancelled when an answer is not read.
    pub(super) stuck: CancellationToken,
}

impl Origin {
    /// A connection from this address, whose streams end when `ending` is cancelled.
    #[must_use]
    pub fn new(ip: IpAddr, ending: CancellationToken) -> Self {
        Self { ip, calls: TaskTracker::new(), ending, stuck: CancellationToken::new() }
    }

    /// Whether no call is under way on it.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.calls.is_empty()
    }

    /// Waits until an answer is not read in time.
    pub async fn is_stuck(&self) {
        self.stuck.cancelled().await;
    }
}
