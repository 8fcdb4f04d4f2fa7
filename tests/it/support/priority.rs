//! Who goes first on a machine that a test shares with the service.

/// Lets everybody else go first, from now on, for this thread.
pub fn lowest() {
    // Elsewhere than on Linux it would be the whole process.
    if cfg!(target_os = "linux") {
        rustix::process::setpriority_process(None, 19).expect("it is allowed to everybody");
    }
}
