//! PostgreSQL's pid file, and the process that it names.

use std::{fs, io, path::Path};

use nix::unistd::Pid;

use crate::Error;

const PID_FILE: &str = "postmaster.pid";
/// The line of the state, counted from 0.
const STATUS_LINE: usize = 7;

/// What PostgreSQL writes about itself into its cluster.
pub(crate) struct PidFile {
    pub(crate) pid: u32,
    /// Whether PostgreSQL accepts connections.
    pub(crate) ready: bool,
}

impl PidFile {
    /// Returns `None` if there is no such file. An unreadable one, such as an empty one
    /// after a power failure, names no process.
    pub(crate) fn read(cluster: &Path) -> Option<Self> {
        let text = fs::read_to_string(cluster.join(PID_FILE)).ok()?;
        let pid = text.lines().next().and_then(|line| line.trim().parse().ok()).unwrap_or(0);
        let ready = text.lines().nth(STATUS_LINE).is_some_and(|line| line.trim() == "ready");
        Some(Self { pid, ready })
    }

    /// Removes the file, if there is one.
    pub(crate) fn remove(cluster: &Path) -> Result<(), Error> {
        match fs::remove_file(cluster.join(PID_FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove the pid file in", cluster)(error))
            }
            _ => Ok(()),
        }
    }
}

/// Returns `None` if the number is not the ID of a process: 0 and negative numbers mean
/// process groups.
pub(crate) fn to_pid(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().filter(|&number| number > 0).map(Pid::from_raw)
}

/// Returns `true` if a process is the main process of the PostgreSQL in `cluster` (a path
/// without symbolic links), and not another one that has reused the ID.
#[cfg(target_os = "linux")]
pub(crate) fn is_postmaster_of(pid: Pid, cluster: &Path) -> bool {
    let process = Path::new("/proc").join(pid.to_string());
    let name = fs::read_to_string(process.join("comm"));
    name.is_ok_and(|name| name.trim_end() == "postgres")
        && fs::read_link(process.join("cwd")).is_ok_and(|dir| dir == cluster)
}

/// Returns `true` if a process is the main process of the PostgreSQL in `cluster` (a path
/// without symbolic links), and not another one that has reused the ID.
#[cfg(not(target_os = "linux"))]
pub(crate) fn is_postmaster_of(pid: Pid, cluster: &Path) -> bool {
    let arguments = std::process::Command::new("ps")
        .args(["-ww", "-o", "args=", "-p", &pid.to_string()])
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    arguments.contains("postgres -D") && arguments.contains(&*cluster.to_string_lossy())
}
