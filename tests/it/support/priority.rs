//! Who goes first on a machine that a test shares with the service.

use std::{future::poll_fn, pin::pin};

/// Lets everybody else go first, from now on, for this thread.
pub fn lowest() {
    // Elsewhere than on Linux it would be the whole process.
    if cfg!(target_os = "linux") {
        rustix::process::setpriority_process(None, 19).expect("it is allowed to everybody");
    }
}

/// Lets those go first who wait for the core of this thread: whatever their priorities are, a
/// kernel that does not preempt may look only every 4 ms whether somebody does.
pub fn give_way() {
    std::thread::yield_now();
}

/// The same after each step of a task.
pub async fn giving_way<T>(task: impl Future<Output = T>) -> T {
    let mut task = pin!(task);
    poll_fn(|context| {
        let done = task.as_mut().poll(context);
        give_way();
        done
    })
    .await
}
