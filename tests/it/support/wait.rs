//! Waiting for what has no event of its own.

use std::{pin::pin, time::Duration};

use tokio::time::{sleep, timeout};

/// Far longer than anything takes, even on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOKS: u32 = 30;

/// Asks again and again until the condition holds.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !holds().await {
            sleep(Duration::from_millis(10)).await;
        }
    };
    in_time(what, asking).await;
}

/// Waits for what must come, but not for ever. A pause of the whole machine, after which all
/// timers are due at once, is no more than one look.
pub async fn in_time<T>(what: &str, coming: impl Future<Output = T>) -> T {
    let mut coming = pin!(coming);
    for _ in 0..LOOKS {
        if let Ok(came) = timeout(PATIENCE / LOOKS, &mut coming).await {
            return came;
        }
    }
    panic!("{what}: not in time")
}
