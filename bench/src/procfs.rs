//! CPU time and memory of processes, read from `/proc` (proc(5)).

use std::{fs, time::Duration};

use crate::error::Result;

/// The unit of CPU times in `/proc` (`USER_HZ`): 1/100 s on all current platforms.
const TICK: Duration = Duration::from_millis(10);

/// The CPU times of a process, all its threads included (`/proc/<pid>/stat`).
#[derive(Clone, Copy, Debug)]
pub struct ProcessStat {
    pub parent: i32,
    /// User and system time of the process itself.
    pub cpu: Duration,
    /// User and system time of the children that the process has waited for.
    pub reaped_cpu: Duration,
}

impl ProcessStat {
    pub fn read(pid: i32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| format!("cannot parse /proc/{pid}/stat").into())
    }

    fn parse(text: &str) -> Option<Self> {
        // The second field, the name in parentheses, may contain spaces and parentheses.
        // The remaining fields start with the third one of proc(5), the state.
        let fields: Vec<_> = text.rsplit_once(") ")?.1.split(' ').collect();
        let ticks = |field: usize| Some(TICK * fields.get(field - 3)?.parse().ok()?);
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            cpu: ticks(14)? + ticks(15)?,
            reaped_cpu: ticks(16)? + ticks(17)?,
        })
    }
}

/// Returns the CPU time of a process and its children, terminated children included.
pub fn cpu_with_children(pid: i32) -> Result<Duration> {
    let parent = ProcessStat::read(pid)?;
    let to_pid = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    let pids = fs::read_dir("/proc")?.flatten().filter_map(to_pid);
    // A child that exits during the scan is counted by the next call, as a reaped one.
    let children =
        pids.filter_map(|pid| ProcessStat::read(pid).ok()).filter(|stat| stat.parent == pid);
    let children: Duration = children.map(|stat| stat.cpu + stat.reaped_cpu).sum();
    Ok(parent.cpu + parent.reaped_cpu + children)
}

/// Returns the CPU time that the whole machine has spent, time stolen by the hypervisor
/// included.
pub fn machine_cpu() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu "));
    let ticks = line.ok_or("/proc/stat has no cpu line")?.split_ascii_whitespace();
    let ticks: Vec<u32> = ticks.map(str::parse).collect::<Result<_, _>>()?;
    // The fields are user, nice, system, idle, iowait, irq, softirq, steal.
    let busy = [0, 1, 2, 5, 6, 7].map(|field| ticks.get(field).copied().unwrap_or_default());
    Ok(busy.map(|ticks| TICK * ticks).iter().sum())
}

/// Returns the resident set size of a process, in bytes.
pub fn resident_bytes(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_contain_spaces_and_parentheses() {
        let fields = (3..=52).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
        let stat = ProcessStat::parse(&format!("7 (a) (b) c) {fields}")).expect("valid");
        assert_eq!(stat.parent, 4);
        assert_eq!(stat.cpu, TICK * (14 + 15));
        assert_eq!(stat.reaped_cpu, TICK * (16 + 17));
    }
}
