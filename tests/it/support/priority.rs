//! Who goes first on a machine that a test shares with the service.

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
