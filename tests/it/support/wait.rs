//! Waiting for what has no event of its own.

use std::time::Duration;

use tokio::time::{sleep, timeout};

/// Far longer than anything takes, even on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks again and again until the condition holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !holds().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, asking).await.unwrap_or_else(|_| panic!("{what}: not in time"));
}
