//! Priorities on a machine that a test shares with the service.

use std::{future::poll_fn, pin::pin};

/// Gives this thread the lowest priority.
pub fn set_lowest() {
    set_nice(19);
}

/// Gives this thread a priority between that of calls and that of hashes, which would otherwise
/// delay it.
pub fn set_low() {
    set_nice(10);
}

fn set_nice(nice: i32) {
    // On other systems than Linux this would change the whole process.
    if cfg!(target_os = "linux") {
        rustix::process::setpriority_process(None, nice)
            .expect("every user may lower the priority");
    }
}

/// Yields the core of this thread. A kernel without preemption may check only every 4 ms
/// whether another thread waits, whatever the priorities are.
pub fn yield_cpu() {
    std::thread::yield_now();
}

/// Yields the core after each poll of a task.
pub async fn yield_between_polls<T>(task: impl Future<Output = T>) -> T {
    let mut task = pin!(task);
    poll_fn(|context| {
        let poll = task.as_mut().poll(context);
        yield_cpu();
        poll
    })
    .await
}
