//! The real binary, in a process of its own.

use std::{
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
    time::timeout,
};

use super::app::SECRET_KEY;

/// How long a process may take for what a test waits for: far longer than it needs, even
/// on a machine that has much else to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process under test; killed when this is dropped.
pub struct Process {
    child: Child,
    output: Arc<Output>,
    /// The working folder, where `.env` may lie.
    _folder: TempDir,
}

#[derive(Default)]
struct Output {
    lines: Mutex<Vec<String>>,
    changed: Notify,
}

/// A command line that is about to run: with nothing of the caller's environment, in an
/// empty folder.
pub struct Run {
    command: Command,
    folder: TempDir,
}

impl Run {
    /// `fast-zero` with these arguments.
    pub fn new(arguments: &[&str]) -> Self {
        let folder = TempDir::new().expect("a folder");
        let mut command = Command::new(env!("CARGO_BIN_EXE_fast-zero"));
        command.args(arguments).env_clear().current_dir(&folder).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { command, folder }
    }

    /// A server on this database and on a port of its own.
    pub fn server(database_url: &str) -> Self {
        Self::new(&[])
            .env("DATABASE_URL", database_url)
            .env("SECRET_KEY", SECRET_KEY)
            .env("LISTEN_ADDR", "127.0.0.1:0")
            .env("LOG_FORMAT", "json")
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Has the log written there, where the test sees to it.
    pub fn log_to(mut self, file: impl Into<Stdio>) -> Self {
        self.command.stderr(file);
        self
    }

    /// Writes a file into the working folder.
    pub fn file(self, name: &str, content: &str) -> Self {
        std::fs::write(self.folder.path().join(name), content).expect("written");
        self
    }

    /// Starts the process.
    pub fn start(mut self) -> Process {
        let mut child = self.command.spawn().expect("the binary starts");
        let output = Arc::<Output>::default();
        collect(child.stdout.take().expect("it is piped"), output.clone());
        if let Some(log) = child.stderr.take() {
            collect(log, output.clone());
        }
        Process { child, output, _folder: self.folder }
    }

    /// Runs the process to its end: its exit code and all that it wrote.
    pub async fn finish(mut self) -> (Option<i32>, String) {
        let output = timeout(PATIENCE, self.command.output()).await;
        let output = output.expect("it ends in time").expect("the binary starts");
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).expect("it writes text"))
    }
}

fn collect(stream: impl AsyncRead + Unpin + Send + 'static, output: Arc<Output>) {
    tokio::spawn(async move {
        let mut lines = BufReader::new(stream).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            output.lines.lock().expect("no test panicked here").push(line);
            output.changed.notify_waiters();
        }
    });
}

impl Process {
    /// Waits until the process writes a line with this text.
    pub async fn line(&self, text: &str) -> String {
        let found = async {
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
        let line = timeout(PATIENCE, found).await;
        line.unwrap_or_else(|late| panic!("no line with {text:?}: {late}:\n{}", self.output()))
    }

    /// Waits until the server serves, and gives its address.
    pub async fn address(&self) -> String {
        self.address_in("\"serving\"").await
    }

    /// Waits until metrics are served, and gives their address.
    pub async fn metrics_address(&self) -> String {
        self.address_in("\"metrics are served\"").await
    }

    async fn address_in(&self, text: &str) -> String {
        let line = self.line(text).await;
        let (_, rest) = line.split_once("\"address\":\"").expect("the line has the address");
        rest.split('"').next().expect("it is quoted").to_owned()
    }

    /// All that was written so far.
    pub fn output(&self) -> String {
        self.output.lines.lock().expect("no test panicked here").join("\n")
    }

    pub fn signal(&self, signal: Signal) {
        signal::kill(self.pid(), signal).expect("it runs");
    }

    pub fn pid(&self) -> Pid {
        let pid = self.child.id().expect("it was not waited for");
        Pid::from_raw(i32::try_from(pid).expect("a process id"))
    }

    /// Memory of the process, in KiB: a line of /proc/<pid>/status.
    pub fn memory(&self, line: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).expect("a number of KiB")
    }

    /// Waits for the end of the process.
    pub async fn end(&mut self) -> ExitStatus {
        let status = timeout(PATIENCE, self.child.wait()).await;
        let status = status.unwrap_or_else(|late| panic!("no end: {late}:\n{}", self.output()));
        status.expect("it can be waited for")
    }
}
