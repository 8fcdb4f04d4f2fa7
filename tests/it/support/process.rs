//! The binary, in a process of its own.

use std::{
    ffi::OsStr,
    fs::{self, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader},
    process::{Child, Command},
    sync::Notify,
    task::JoinSet,
    time::timeout,
};

use super::app::SECRET_KEY;

/// The timeout for a line or the exit of a process: far longer than it needs, even on a
/// busy machine.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How long the last lines of a process that has ended may take.
const LAST_LINES_TIMEOUT: Duration = Duration::from_secs(1);

/// A process under test. It is killed when the value is dropped.
pub struct Process {
    child: Child,
    output: Arc<Output>,
    /// The tasks that read the output.
    collectors: JoinSet<()>,
    /// The working directory, which may contain a `.env`.
    _dir: TempDir,
}

#[derive(Default)]
struct Output {
    lines: Mutex<Vec<String>>,
    changed: Notify,
}

/// A command line, with an empty environment and an empty working directory.
pub struct Binary {
    command: Command,
    dir: TempDir,
}

impl Binary {
    /// Prepares `fast-zero` with these arguments.
    pub fn new(arguments: &[&str]) -> Self {
        let dir = TempDir::new().expect("a directory");
        let mut command = Command::new(env!("CARGO_BIN_EXE_fast-zero"));
        command.args(arguments).env_clear().current_dir(&dir).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command, dir }
    }

    /// Prepares `fast-zero` with the arguments that bash makes of this text.
    pub fn in_bash(arguments: &str) -> Self {
        let Self { command: direct, dir } = Self::new(&[]);
        let program = direct.as_std().get_program().to_owned();
        let mut command = Command::new("bash");
        command.arg("-c").arg(format!("exec \"$0\" {arguments}")).arg(program);
        command.env_clear().current_dir(&dir).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command, dir }
    }

    /// Prepares a server with this database and a free port.
    pub fn server(database_url: &str) -> Self {
        Self::new(&[])
            .env("DATABASE_URL", database_url)
            .env("SECRET_KEY", SECRET_KEY)
            .env("LISTEN_ADDR", "127.0.0.1:0")
            .env("LOG_FORMAT", "json")
    }

    pub fn env(self, name: &str, value: &str) -> Self {
        self.env_os(name, value)
    }

    /// Sets a variable to a value that may not be UTF-8.
    pub fn env_os(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Provides a short text on standard input, a pipe.
    pub fn input(mut self, text: &str) -> Self {
        let (reader, mut writer) = io::pipe().expect("a pipe");
        writer.write_all(text.as_bytes()).expect("written");
        self.command.stdin(reader);
        self
    }

    /// Reads standard input from this file, which may be a terminal.
    pub fn input_from(mut self, file: impl Into<Stdio>) -> Self {
        self.command.stdin(file);
        self
    }

    /// Redirects the log.
    pub fn log_to(mut self, file: impl Into<Stdio>) -> Self {
        self.command.stderr(file);
        self
    }

    /// Writes a file to the working directory, or to a directory in it. Only the owner may read
    /// it, as libpq requires of its password file.
    pub fn file(self, name: &str, content: &str) -> Self {
        self.file_of_bytes(name, content.as_bytes())
    }

    /// Writes a file that may not be UTF-8.
    pub fn file_of_bytes(self, name: &str, content: &[u8]) -> Self {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("created");
        fs::write(&path, content).expect("written");
        fs::set_permissions(path, Permissions::from_mode(0o600)).expect("changed");
        self
    }

    /// Starts the process.
    pub fn start(mut self) -> Process {
        let mut child = self.command.spawn().expect("the binary starts");
        let output = Arc::<Output>::default();
        let mut collectors = JoinSet::new();
        collectors.spawn(collect(child.stdout.take().expect("piped"), output.clone()));
        if let Some(log) = child.stderr.take() {
            collectors.spawn(collect(log, output.clone()));
        }
        Process { child, output, collectors, _dir: self.dir }
    }

    /// Runs the process until it exits. Returns its exit code and all its output.
    pub async fn output(self) -> (Option<i32>, String) {
        let (code, stdout, stderr) = self.outputs().await;
        (code, stdout + &stderr)
    }

    /// Runs the process until it exits. Returns its exit code, and what it wrote to standard output
    /// and to standard error.
    pub async fn outputs(mut self) -> (Option<i32>, String, String) {
        let output = timeout(TIMEOUT, self.command.output()).await;
        let output = output.expect("an exit in time").expect("the binary starts");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code(), text(output.stdout), text(output.stderr))
    }
}

async fn collect(stream: impl AsyncRead + Unpin, output: Arc<Output>) {
    let mut lines = BufReader::new(stream).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        output.lines.lock().expect("not poisoned").push(line);
        output.changed.notify_waiters();
    }
}

impl Process {
    /// Waits until the process writes a line that contains this text.
    pub async fn wait_for_line(&self, text: &str) -> String {
        let search = async {
            loop {
                let changed = self.output.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if let Some(line) = self.output().lines().find(|line| line.contains(text)) {
                    return line.to_owned();
                }
                changed.await;
            }
        };
        let line = timeout(TIMEOUT, search).await;
        line.unwrap_or_else(|elapsed| {
            panic!("no line with {text:?}: {elapsed}:\n{}", self.output())
        })
    }

    /// Waits until the server accepts calls, and returns its address.
    pub async fn address(&self) -> String {
        self.address_in_line("\"serving\"").await
    }

    /// Waits until the server serves metrics, and returns the address of the port.
    pub async fn metrics_address(&self) -> String {
        self.address_in_line("\"serving metrics\"").await
    }

    async fn address_in_line(&self, text: &str) -> String {
        let line = self.wait_for_line(text).await;
        let (_, rest) = line.split_once("\"address\":\"").expect("the line contains the address");
        rest.split('"').next().expect("a JSON string").to_owned()
    }

    /// Returns all output so far.
    pub fn output(&self) -> String {
        self.output.lines.lock().expect("not poisoned").join("\n")
    }

    pub fn signal(&self, signal: Signal) {
        signal::kill(self.pid(), signal).expect("a running process");
    }

    pub fn pid(&self) -> Pid {
        let pid = self.child.id().expect("a running process");
        Pid::from_raw(i32::try_from(pid).expect("a process id"))
    }

    /// Returns the memory of the process in KiB, from a field of `/proc/<pid>/status`.
    pub fn memory_kib(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("a running process");
        let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .expect("a number of KiB")
    }

    /// Waits until the process exits, and its last lines are read.
    pub async fn wait(&mut self) -> ExitStatus {
        let status = timeout(TIMEOUT, self.child.wait()).await;
        let status =
            status.unwrap_or_else(|elapsed| panic!("no exit: {elapsed}:\n{}", self.output()));
        let read = async { while self.collectors.join_next().await.is_some() {} };
        // A process that it has started may still have its output open.
        let _ = timeout(LAST_LINES_TIMEOUT, read).await;
        status.expect("a child process")
    }
}
