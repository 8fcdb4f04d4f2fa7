//! The process: its allocator and its exit code.

use std::process::ExitCode;

/// Calls allocate many small pieces on one thread and free them on another, for which glibc takes
/// locks; and jemalloc returns what a burst of calls took to the system.
#[cfg(all(feature = "jemalloc", target_os = "linux"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    fast_zero::run()
}
