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
    in_time(what, asking).await;
}

/// Waits for what must come, but not for ever.
pub async fn in_time<T>(what: &str, coming: impl Future<Output = T>) -> T {
    timeout(PATIENCE, coming).await.unwrap_or_else(|_| panic!("{what}: not in time"))
}
