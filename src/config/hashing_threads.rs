//! How many passwords are hashed at a time, by the cores and the memory of the container.

use std::thread;

use sysinfo::{ProcessRefreshKind, ProcessesToUpdate, System, get_current_pid};

/// The memory of one hash, in bytes: 19 MiB of argon2id with the default parameters.
///
/// Test: `hashing_threads_take_a_quarter_of_the_memory_at_most`.
const HASH_BYTES: u64 = argon2::Params::DEFAULT_M_COST as u64 * 1024;

/// The part of the memory limit that hashes may take: one in four. The other three are for calls,
/// connections and caches.
///
/// Test: `hashing_threads_take_a_quarter_of_the_memory_at_most`.
const MEMORY_DIVISOR: u64 = 4;

/// The largest default: a machine with more cores has other work as well.
///
/// Test: `hashing_threads_take_a_quarter_of_the_memory_at_most`.
const MAX_DEFAULT_THREADS: u16 = 64;

/// Returns the number of cores that this process may use.
pub(super) fn cores() -> u16 {
    thread::available_parallelism()
        .map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX))
}

/// Returns one thread for each core, as far as the memory of the container suffices. On Linux,
/// hashes have the lowest priority, so they leave the cores to calls; elsewhere, one core is left.
pub(super) fn default_hashing_threads() -> u16 {
    let cores = if cfg!(target_os = "linux") { cores() } else { cores().saturating_sub(1).max(1) };
    cores.min(MAX_DEFAULT_THREADS).min(max_hashing_threads(memory_limit()))
}

/// Returns the number of threads that the memory limit permits, at least one.
pub(super) fn max_hashing_threads(memory_limit: Option<u64>) -> u16 {
    memory_limit.map_or(u16::MAX, |bytes| {
        u16::try_from(bytes / MEMORY_DIVISOR / HASH_BYTES).unwrap_or(u16::MAX).max(1)
    })
}

/// Returns the memory limit of the control group of this process, in bytes: the lowest one on the
/// path to the root, of version 1 or 2. Returns `None` without a limit, and on systems other than
/// Linux.
pub(super) fn memory_limit() -> Option<u64> {
    let pid = get_current_pid().ok()?;
    let mut system = System::new().ok()?;
    let this = ProcessesToUpdate::Some(&[pid]);
    // Without the threads of the process: every subcommand reads this for the default.
    let kind = ProcessRefreshKind::nothing().without_tasks();
    system.refresh_processes_specifics(this, false, kind);
    system.process(pid)?.cgroup_limits().map(|limits| limits.total_memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashing_threads_take_a_quarter_of_the_memory_at_most() {
        const MIB: u64 = 1024 * 1024;
        for (limit, threads) in [
            (Some(0), 1),
            (Some(64 * MIB), 1),
            (Some(2 * 4 * 19 * MIB - 1), 1),
            (Some(2 * 4 * 19 * MIB), 2),
            (Some(1024 * MIB), 13),
            (Some(u64::MAX), u16::MAX),
            (None, u16::MAX),
        ] {
            assert_eq!(max_hashing_threads(limit), threads, "{limit:?}");
        }
        let threads = default_hashing_threads();
        assert!((1..=cores().min(64)).contains(&threads), "{threads}");
    }
}
