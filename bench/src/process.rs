//! Processes that end with this one, and what the system says of any.

use std::{
    env,
    error::Error,
    ffi::{OsStr, OsString},
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{self, Stdio},
    time::{Duration, Instant},
};

use fast_zero::{probe, types::error_chain::BoxError as Cause};
use nix::{
    sys::{
        prctl,
        signal::{self, Signal},
    },
    unistd::{Pid, getppid},
};
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

use crate::Result;

/// How long a server may take to start, and to stop.
const START_LIMIT: Duration = Duration::from_mins(1);
const STOP_LIMIT: Duration = Duration::from_secs(15);
/// The pause between two looks at the log of a server that starts: what its start is
/// measured to.
const START_PAUSE: Duration = Duration::from_millis(1);

/// How much of the end of a log is shown when something fails, in bytes.
const LAST_WORDS: usize = 2_000;

/// The unit of CPU times in `/proc`, 1/100 s on all machines of today (`USER_HZ`).
const TICK: Duration = Duration::from_millis(10);

/// A program that ends when this process does, even when it is killed, and that Ctrl-C at
/// the terminal does not reach. To be started from the main thread, because the system
/// watches the thread that has started it.
pub fn leashed(program: impl AsRef<OsStr>) -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    command.args(["leashed", &process::id().to_string()]).arg(program);
    command.process_group(0).kill_on_drop(true).stdin(Stdio::null());
    Ok(command)
}

/// Becomes that program. Returns only if it cannot.
pub fn become_leashed(parent: i32, command: &[OsString]) -> Cause {
    let Some((program, arguments)) = command.split_first() else {
        return "there is no program".into();
    };
    if let Err(error) = prctl::set_pdeathsig(Signal::SIGTERM) {
        return error.into();
    }
    // It may have ended before it was watched.
    if getppid() != Pid::from_raw(parent) {
        return "the parent has ended".into();
    }
    process::Command::new(program).args(arguments).exec().into()
}

/// A gRPC server in a process of its own.
#[derive(Debug)]
pub struct Server {
    child: Child,
    pub pid: i32,
    /// Where it serves: host and port.
    pub address: String,
    /// How long it took until it was SERVING.
    pub started_in: Duration,
    log: PathBuf,
}

impl Server {
    /// Starts a server that logs to this file where it serves, as fast-zero does. Its log
    /// is not read while it runs: a reader would take of the machine.
    pub async fn start(mut command: Command, log: &Path) -> Result<Self> {
        let begun = Instant::now();
        command.stdout(Stdio::null()).stderr(fs::File::create(log)?);
        let mut child = command.spawn()?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).ok_or("it has no number")?;
        let serving = async {
            loop {
                let text = fs::read_to_string(log)?;
                if let Some(address) = text.lines().find_map(serving_at) {
                    return Ok(address);
                }
                if let Some(status) = child.try_wait()? {
                    return Err(
                        format!("a server ended with {status}:\n{}", last_words(log)).into()
                    );
                }
                sleep(START_PAUSE).await;
            }
        };
        let address: Result<_> = timeout(START_LIMIT, serving).await?;
        let started_in = begun.elapsed();
        Ok(Self { child, pid, address: address?, started_in, log: log.to_owned() })
    }

    /// Whether its health says SERVING.
    pub async fn is_serving(&self) -> bool {
        matches!(probe::probe(&self.address, "", None).await, probe::Outcome::Serving)
    }

    /// Asks it to stop. How long that took.
    pub async fn stop(mut self) -> Result<Duration> {
        let begun = Instant::now();
        signal::kill(Pid::from_raw(self.pid), Signal::SIGTERM)?;
        timeout(STOP_LIMIT, self.child.wait()).await??;
        Ok(begun.elapsed())
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        last_words(&self.log)
    }
}

/// The address in the line of the log that says so.
fn serving_at(line: &str) -> Option<String> {
    let (_, rest) = line.contains("\"serving\"").then(|| line.split_once("\"address\":\""))??;
    rest.split_once('"').map(|(address, _)| address.to_owned())
}

/// The end of a log.
fn last_words(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(LAST_WORDS)..]).into_owned()
}

/// What `/proc/<pid>/stat` says of a process with all its threads.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    pub parent: i32,
    /// CPU time of its own.
    pub own: Duration,
    /// CPU time of its children that have ended.
    pub reaped: Duration,
}

impl Stat {
    pub fn of(pid: i32) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| format!("/proc/{pid}/stat is not as expected").into())
    }

    /// The name, in parentheses, may hold anything; what is counted here begins after it
    /// with the state, which proc(5) calls the third field.
    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<_> = text.rsplit_once(") ")?.1.split(' ').collect();
        let ticks = |field: usize| Some(TICK * fields.get(field - 3)?.parse().ok()?);
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            own: ticks(14)? + ticks(15)?,
            reaped: ticks(16)? + ticks(17)?,
        })
    }
}

/// CPU time of a process, its children, and those that have ended.
pub fn cpu_of_family(pid: i32) -> Result<Duration> {
    let head = Stat::of(pid)?;
    let is_number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    let pids = fs::read_dir("/proc")?.flatten().filter_map(is_number);
    // One that ends in between is counted next time, as one that has ended.
    let children = pids.filter_map(|child| Stat::of(child).ok()).filter(|stat| stat.parent == pid);
    Ok(head.own + head.reaped + children.map(|stat| stat.own + stat.reaped).sum::<Duration>())
}

/// CPU time that the whole machine has spent, and the hypervisor has kept from it.
pub fn cpu_of_machine() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().and_then(|line| line.strip_prefix("cpu ")).ok_or("no cpu")?;
    let ticks = line.split_ascii_whitespace().map(str::parse);
    let ticks: Vec<u32> = ticks.collect::<Result<_, _>>()?;
    // proc(5): user, nice, system, idle, iowait, irq, softirq, steal.
    let busy = [0, 1, 2, 5, 6, 7].map(|field| ticks.get(field).copied().unwrap_or_default());
    Ok(busy.map(|ticks| TICK * ticks).iter().sum())
}

/// Resident memory of a process, in bytes.
pub fn resident(pid: i32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes * 1024)
}

/// The service's binary, built with the profile of this program's own.
pub async fn build() -> Result<PathBuf> {
    let own = env::current_exe()?;
    let folder = own.parent().ok_or("this program is in no folder")?;
    let profile = folder.file_name().and_then(OsStr::to_str).ok_or("its folder has no name")?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--locked", "--package", "fast-zero", "--bin", "fast-zero"])
        // As it is deployed.
        .args(["--features", "jemalloc"])
        .args(["--profile", profile, "--target-dir"])
        .arg(folder.parent().ok_or("its folder is in no folder")?)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .kill_on_drop(true)
        .status()
        .await?;
    if !status.success() {
        return Err(format!("cargo build ended with {status}").into());
    }
    Ok(folder.join("fast-zero"))
}

/// An error with what led to it.
pub fn because(doing: &str, error: impl Error) -> Cause {
    format!("{doing}: {error}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let fields = (3..=52).map(|field| field.to_string()).collect::<Vec<_>>().join(" ");
        let stat = Stat::parse(&format!("7 (a) (b) c) {fields}")).expect("good");
        assert_eq!(stat.parent, 4);
        assert_eq!(stat.own, TICK * (14 + 15));
        assert_eq!(stat.reaped, TICK * (16 + 17));
    }
}
