//! Waiting for conditions that have no event of their own.

use std::{pin::pin, time::Duration};

use tokio::time::{sleep, timeout};

/// Far longer than any operation takes, even on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);
const TIMEOUT_STEPS: u32 = 30;

/// Polls until the condition holds.
pub async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let polling = async {
        while !condition().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    with_timeout(what, polling).await;
}

/// Waits for a future, and panics if it does not complete in time. The timeout has steps: a
/// pause of the whole machine, after which all timers are due at once, costs one of them.
pub async fn with_timeout<T>(what: &str, future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    for _ in 0..TIMEOUT_STEPS {
        if let Ok(output) = timeout(TIMEOUT / TIMEOUT_STEPS, &mut future).await {
            return output;
        }
    }
    panic!("{what}: timed out")
}
