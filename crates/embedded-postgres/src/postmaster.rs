//! PostgreSQL's main process.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use secrecy::SecretString;
use tokio::{
    process::Child,
    time::{sleep, timeout},
};

use crate::{
    App, Error,
    cluster::Cluster,
    command::command,
    dirs::PRIVATE_DIR_MODE,
    installation::Installation,
    instance::{EphemeralDir, InstanceDir},
    layout::SOCKET_DIR,
    orphans::stop_orphans,
    pid_file::{PidFile, to_pid},
    shutdown::terminate,
};

/// A part of the socket's file name only: PostgreSQL listens on no TCP port.
const PORT: u16 = 5432;
/// The maximum length of a socket's path: the size of `sun_path` in `sockaddr_un`, on Linux
/// and on other systems, without the terminating zero.
const MAX_SOCKET_PATH_BYTES: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// How long a start may take: usually 0.1 s, but after a crash PostgreSQL replays up to
/// `max_wal_size`.
const START_TIMEOUT: Duration = Duration::from_mins(2);
const START_POLL_INTERVAL: Duration = Duration::from_millis(3);

/// The settings of every start. They override the files in the cluster.
const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "unix_socket_permissions=0700",
    // A quarter of the default, to save disk space.
    "max_wal_size=256MB",
];
const DURABLE_SETTINGS: &[&str] = &[
    "fsync=on",
    "full_page_writes=on",
    "synchronous_commit=on",
    // The default: enough for one server's pool and some psql sessions.
    "max_connections=100",
    // Half of the default: the data is small, and the machine is a developer's.
    "shared_buffers=64MB",
];
const EPHEMERAL_SETTINGS: &[&str] = &[
    "fsync=off",
    "full_page_writes=off",
    "synchronous_commit=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    // Enough for 60 parallel tests, each with a pool of up to 8 connections.
    "max_connections=500",
    "shared_buffers=128MB",
];
/// Reads without the three worker processes of the default, as older versions do.
const IO_METHOD_SETTINGS: &[&str] = &["io_method=sync"];
const IO_METHOD_SINCE: u32 = 18;

/// How much of PostgreSQL's log an error message contains.
const LOG_TAIL_BYTES: u64 = 2_000;

/// A running PostgreSQL.
#[derive(Debug)]
pub(crate) struct Postmaster {
    process: Child,
    cluster: PathBuf,
    log: PathBuf,
    url: SecretString,
    _socket: SocketDir,
}

impl Postmaster {
    /// Starts PostgreSQL, after stopping orphaned processes in the same directory. It does
    /// not accept connections yet.
    pub(crate) async fn start(
        app: &App,
        instance: &InstanceDir,
        installation: &Installation,
        cluster: Cluster,
    ) -> Result<Self, Error> {
        stop_orphans(instance.path()).await?;
        let socket = SocketDir::create(app, instance).await?;
        let log = create_log(&cluster.log).map_err(Error::io("create", &cluster.log))?;
        let program = installation.program("postgres");
        let process = command(&program, &cluster.dir)
            .arg("-D")
            .arg(&cluster.dir)
            .args(["-p", &PORT.to_string()])
            .args(settings(instance.is_ephemeral(), installation.major))
            .args(["-c", &format!("cluster_name={}", app.name)])
            .args([OsStr::new("-c"), &socket.setting()])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(Error::io("start", &program))?;
        let url = cluster.url(socket.path(), PORT);
        Ok(Self { process, cluster: cluster.dir, log: cluster.log, url, _socket: socket })
    }

    /// Returns the URL of the database. It contains the password.
    pub(crate) fn url(&self) -> &SecretString {
        &self.url
    }

    /// Waits until PostgreSQL accepts connections. It writes that to its pid file, from
    /// which `pg_ctl --wait` reads the same.
    pub(crate) async fn wait_until_ready(&mut self) -> Result<(), Error> {
        let ready = async {
            loop {
                if let Some(status) = self.process.try_wait().map_err(self.wait_error())? {
                    return Err(self.exit_error(status));
                }
                let file = PidFile::read(&self.cluster);
                if file.is_some_and(|file| self.process.id() == Some(file.pid) && file.ready) {
                    return Ok(());
                }
                sleep(START_POLL_INTERVAL).await;
            }
        };
        let timed_out = || Error::Timeout {
            operation: "starting PostgreSQL",
            timeout_seconds: START_TIMEOUT.as_secs(),
        };
        timeout(START_TIMEOUT, ready).await.unwrap_or_else(|_| Err(timed_out()))
    }

    /// Waits until PostgreSQL exits without a request, and returns the error.
    pub(crate) async fn exited(&mut self) -> Error {
        match self.process.wait().await {
            Ok(status) => self.exit_error(status),
            Err(error) => self.wait_error()(error),
        }
    }

    /// Stops PostgreSQL and closes all its connections.
    pub(crate) async fn stop(mut self) {
        if let Some(pid) = self.process.id().and_then(to_pid) {
            let exited = async || {
                let _ = self.process.wait().await;
            };
            terminate(pid, exited).await;
        }
    }

    fn exit_error(&self, status: ExitStatus) -> Error {
        let log_tail = read_tail(&self.log).unwrap_or_default();
        Error::PostgresExited { status, log: self.log.clone(), log_tail }
    }

    fn wait_error(&self) -> impl FnOnce(io::Error) -> Error + use<> {
        Error::io("wait for PostgreSQL in", self.cluster.clone())
    }
}

/// Returns the settings of a start as command-line arguments.
fn settings(ephemeral: bool, major: u32) -> impl Iterator<Item = &'static str> {
    let by_durability = if ephemeral { EPHEMERAL_SETTINGS } else { DURABLE_SETTINGS };
    let by_version = if major >= IO_METHOD_SINCE { IO_METHOD_SETTINGS } else { &[] };
    let settings = SETTINGS.iter().chain(by_durability).chain(by_version);
    settings.flat_map(|setting| ["-c", setting])
}

/// The directory of the socket, accessible to this user only.
#[derive(Debug)]
enum SocketDir {
    InInstance(PathBuf),
    /// For a data directory whose path is too long for a socket, or not UTF-8 and so no
    /// part of a URL.
    Ephemeral(EphemeralDir),
}

impl SocketDir {
    /// Recreates the directory: PostgreSQL takes the socket of a crashed process to be in
    /// use if another process has reused its ID.
    async fn create(app: &App, instance: &InstanceDir) -> Result<Self, Error> {
        let dir = instance.path().join(SOCKET_DIR);
        let socket = dir.join(format!(".s.PGSQL.{PORT}"));
        if socket.as_os_str().len() > MAX_SOCKET_PATH_BYTES || socket.to_str().is_none() {
            return EphemeralDir::create(app).await.map(Self::Ephemeral);
        }
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => DirBuilder::new().mode(PRIVATE_DIR_MODE).create(&dir),
        }
        .map_err(Error::io("create", &dir))?;
        Ok(Self::InInstance(dir))
    }

    fn path(&self) -> &Path {
        match self {
            Self::InInstance(dir) => dir,
            Self::Ephemeral(dir) => dir.path(),
        }
    }

    /// Returns the setting, a list of paths of which each may be quoted.
    fn setting(&self) -> OsString {
        let path = self.path().to_string_lossy().replace('"', "\"\"");
        format!("unix_socket_directories=\"{path}\"").into()
    }
}

/// Creates an empty log, accessible to this user only, after renaming the previous one.
fn create_log(log: &Path) -> io::Result<File> {
    match fs::rename(log, log.with_extension("log.old")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(log)
}

/// Reads the last lines of a log.
fn read_tail(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}
