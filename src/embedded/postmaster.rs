//! PostgreSQL's main process, and what a crash left of one.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use secrecy::SecretString;
use tokio::{
    process::Child,
    time::{sleep, timeout},
};

use super::{
    Error,
    cluster::{self, Cluster},
    command::command,
    folders::{Home, PRIVATE, TemporaryFolder},
    install::Installation,
};

/// What PostgreSQL calls its pid file, and the line of its state, from 0.
const PID_FILE: &str = "postmaster.pid";
const PID_FILE_STATUS: usize = 7;
/// Only names the socket's file: PostgreSQL listens on no TCP port.
const PORT: u16 = 5432;
/// The longest path of a socket, in bytes: what `sockaddr_un` holds, on Linux and
/// elsewhere, less the zero at its end.
const MAX_SOCKET_PATH: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// How long a start may take: a tenth of a second, but a crash before it leaves up to
/// `max_wal_size` to be read again.
const START_LIMIT: Duration = Duration::from_mins(2);
const START_PAUSE: Duration = Duration::from_millis(3);
/// How PostgreSQL is ended, and how long it may take each time. First it ends all
/// connections and writes everything to its place; this is given so long that nothing
/// is left after five seconds. Then it ends at once, and the next start recovers; five
/// seconds later it kills those of its processes that are stuck. Then it is killed.
const ENDINGS: [(Signal, Duration); 3] = [
    (Signal::SIGINT, Duration::from_millis(3_500)),
    (Signal::SIGQUIT, Duration::from_secs(6)),
    (Signal::SIGKILL, Duration::from_secs(1)),
];
const END_PAUSE: Duration = Duration::from_millis(10);

/// What holds whatever the data folder's own files say.
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "unix_socket_permissions=0700",
    "cluster_name=fast-zero",
    // A quarter of the default, for the disk's sake.
    "max_wal_size=256MB",
];
/// For data that stay.
const KEPT_SETTINGS: &[&str] = &[
    "fsync=on",
    "full_page_writes=on",
    "synchronous_commit=on",
    // One server's pool and people with psql: the default.
    "max_connections=100",
    // Half of the default: few data, and the machine is also a developer's.
    "shared_buffers=64MB",
];
/// For data to be thrown away.
const TEMPORARY_SETTINGS: &[&str] = &[
    "fsync=off",
    "full_page_writes=off",
    "synchronous_commit=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    // 60 tests at once, each with a pool of up to 8 connections, and some to spare.
    "max_connections=500",
    "shared_buffers=128MB",
];
/// Reads without three processes for that, which versions before have not either.
const IO_METHOD_SETTINGS: &[&str] = &["io_method=sync"];
const IO_METHOD_SINCE: u32 = 18;

/// How much of the end of PostgreSQL's log goes into an error's message, in bytes.
const LAST_WORDS: u64 = 2_000;

/// PostgreSQL, running.
#[derive(Debug)]
pub(super) struct Postmaster {
    process: Child,
    data: PathBuf,
    log: PathBuf,
    url: SecretString,
    _socket: SocketFolder,
}

impl Postmaster {
    /// Starts PostgreSQL, after ending those that killed processes may have left. It
    /// does not answer yet.
    pub(super) async fn start(
        home: &Home,
        installation: &Installation,
        cluster: Cluster,
    ) -> Result<Self, Error> {
        end_leftovers_in(home.folder()).await?;
        let socket = SocketFolder::make(home).await?;
        let log = new_log(&cluster.log).map_err(Error::io("making", &cluster.log))?;
        let program = installation.program("postgres");
        let process = command(&program, &cluster.folder)
            .arg("-D")
            .arg(&cluster.folder)
            .args(["-p", &PORT.to_string()])
            .args(settings(home.is_temporary(), installation.major))
            .args([OsStr::new("-c"), &socket.setting()])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(Error::io("starting", &program))?;
        let url = cluster.url(socket.path(), PORT);
        Ok(Self { process, data: cluster.folder, log: cluster.log, url, _socket: socket })
    }

    /// How to connect.
    pub(super) fn url(&self) -> &SecretString {
        &self.url
    }

    /// Waits until PostgreSQL accepts connections, which it writes into its pid file
    /// (`pg_ctl --wait` reads the same).
    pub(super) async fn ready(&mut self) -> Result<(), Error> {
        let ready = async {
            loop {
                if let Some(status) = self.process.try_wait().map_err(self.cannot_wait())? {
                    return Err(self.last_words(status));
                }
                let file = PidFile::read(&self.data);
                if file.is_some_and(|file| self.process.id() == Some(file.pid) && file.ready) {
                    return Ok(());
                }
                sleep(START_PAUSE).await;
            }
        };
        let late = || Error::TooLong {
            what: "the start of PostgreSQL",
            limit_seconds: START_LIMIT.as_secs(),
        };
        timeout(START_LIMIT, ready).await.unwrap_or_else(|_| Err(late()))
    }

    /// Waits until PostgreSQL ends by itself, and tells how.
    pub(super) async fn ended(&mut self) -> Error {
        match self.process.wait().await {
            Ok(status) => self.last_words(status),
            Err(error) => self.cannot_wait()(error),
        }
    }

    /// Ends PostgreSQL and all its connections.
    pub(super) async fn stop(mut self) {
        if let Some(pid) = self.process.id().and_then(as_pid) {
            end(pid, async || {
                let _ = self.process.wait().await;
            })
            .await;
        }
    }

    fn last_words(&self, status: ExitStatus) -> Error {
        let last_words = end_of(&self.log).unwrap_or_default();
        Error::Ended { status, log: self.log.clone(), last_words }
    }

    fn cannot_wait(&self) -> impl FnOnce(io::Error) -> Error + use<> {
        Error::io("waiting for PostgreSQL in", self.data.clone())
    }
}

/// The settings of a start, as `-c` and a setting in turn.
fn settings(temporary: bool, major: u32) -> impl Iterator<Item = &'static str> {
    let by_kind = if temporary { TEMPORARY_SETTINGS } else { KEPT_SETTINGS };
    let by_version = if major >= IO_METHOD_SINCE { IO_METHOD_SETTINGS } else { &[] };
    let settings = SETTINGS.iter().chain(by_kind).chain(by_version);
    settings.flat_map(|setting| ["-c", setting])
}

/// The folder of the socket, which only this user can enter.
#[derive(Debug)]
enum SocketFolder {
    Beside(PathBuf),
    /// The data folder's path is too long for a socket, or no UTF-8 for a URL.
    Temporary(TemporaryFolder),
}

impl SocketFolder {
    /// Makes it anew: PostgreSQL takes a socket that a crash left for one in use, if
    /// another process has its number by now.
    async fn make(home: &Home) -> Result<Self, Error> {
        let folder = home.folder().join("socket");
        let socket = folder.join(format!(".s.PGSQL.{PORT}"));
        if socket.as_os_str().len() > MAX_SOCKET_PATH || socket.to_str().is_none() {
            return TemporaryFolder::make().await.map(Self::Temporary);
        }
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => DirBuilder::new().mode(PRIVATE).create(&folder),
        }
        .map_err(Error::io("making", &folder))?;
        Ok(Self::Beside(folder))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Beside(folder) => folder,
            Self::Temporary(folder) => folder.path(),
        }
    }

    /// As a setting: a list of paths, each of which may be quoted.
    fn setting(&self) -> OsString {
        let path = self.path().to_string_lossy().replace('"', "\"\"");
        format!("unix_socket_directories=\"{path}\"").into()
    }
}

/// Ends the PostgreSQLs that killed processes left running in a home, and removes what
/// would keep a new one from starting. The home must be held.
pub(super) async fn end_leftovers_in(home: &Path) -> Result<(), Error> {
    for data in cluster::folders(home) {
        let data = data.canonicalize().map_err(Error::io("finding", &data))?;
        let Some(file) = PidFile::read(&data) else { continue };
        if let Some(pid) = as_pid(file.pid).filter(|&pid| is_postmaster_of(pid, &data)) {
            let folder = data.display();
            tracing::warn!(%pid, %folder, "ending a PostgreSQL that was left running");
            let gone = async || {
                while is_postmaster_of(pid, &data) {
                    sleep(END_PAUSE).await;
                }
            };
            if !end(pid, gone).await {
                return Err(Error::Leftover { pid: pid.as_raw(), folder: data });
            }
        }
        // PostgreSQL believes a pid file when any process has that number. Should
        // processes of the old one still be there, then the memory that they share
        // keeps a new one from starting.
        match fs::remove_file(data.join(PID_FILE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("removing the pid file in", data)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Ends a process, with more and more force; whether it is `gone` then.
async fn end(pid: Pid, mut gone: impl AsyncFnMut()) -> bool {
    for (signal, limit) in ENDINGS {
        // It may have ended in between.
        let _ = kill(pid, signal);
        if timeout(limit, gone()).await.is_ok() {
            return true;
        }
        tracing::warn!(%pid, %signal, "PostgreSQL has not ended in time");
    }
    false
}

/// What PostgreSQL tells about itself in its data folder.
struct PidFile {
    pid: u32,
    ready: bool,
}

impl PidFile {
    /// `None` where there is no such file. One that cannot be understood, such as an
    /// empty one after a power failure, names no process.
    fn read(data: &Path) -> Option<Self> {
        let text = fs::read_to_string(data.join(PID_FILE)).ok()?;
        let pid = text.lines().next().and_then(|line| line.trim().parse().ok()).unwrap_or(0);
        let ready = text.lines().nth(PID_FILE_STATUS).is_some_and(|line| line.trim() == "ready");
        Some(Self { pid, ready })
    }
}

/// No process and no group of processes where the number is none of a process.
fn as_pid(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().filter(|&number| number > 0).map(Pid::from_raw)
}

/// Whether a process is the main process of the PostgreSQL in a folder (without links
/// in its path), and not another one that has got its number since.
#[cfg(target_os = "linux")]
fn is_postmaster_of(pid: Pid, data: &Path) -> bool {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let name = fs::read_to_string(process.join("comm"));
    name.is_ok_and(|name| name.trim_end() == "postgres")
        && fs::read_link(process.join("cwd")).is_ok_and(|folder| folder == data)
}

/// Whether a process is the main process of the PostgreSQL in a folder (without links
/// in its path), and not another one that has got its number since.
#[cfg(not(target_os = "linux"))]
fn is_postmaster_of(pid: Pid, data: &Path) -> bool {
    let arguments = std::process::Command::new("ps")
        .args(["-ww", "-o", "args=", "-p", &pid.to_string()])
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    arguments.contains("postgres -D") && arguments.contains(&*data.to_string_lossy())
}

/// An empty log, for nobody but this user. The one of the start before stays beside it.
fn new_log(log: &Path) -> io::Result<File> {
    match fs::rename(log, log.with_extension("log.old")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(log)
}

/// The last lines of a log.
fn end_of(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))?;
    let mut bytes = Vec::new();
    file.take(LAST_WORDS).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}
