//! The embedded PostgreSQL, from outside: `fast-zero postgres` as a process.

use std::{
    fs::{self, Permissions},
    io::{BufRead, BufReader},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tempfile::TempDir;

/// Long enough for a first start, which downloads PostgreSQL.
pub const START_TIMEOUT: Duration = Duration::from_mins(10);
/// The documented maximum after which no process of PostgreSQL is left.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);
pub const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Creates a directory that every user can enter: if root runs the tests, the child switches
/// to another user.
pub fn temp_dir() -> TempDir {
    let dir = tempfile::tempdir_in("/tmp").expect("a temporary directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("an owner");
    dir
}

/// Returns the command `fast-zero` with arguments, outside of the directory with this
/// repository's `.env`.
pub fn fast_zero(args: &[&str], data_dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fast-zero"));
    command
        .args(args)
        .current_dir("/")
        .env("FASTZERO_DATA_DIR", data_dir)
        .env("RUST_LOG", "warn")
        // A common locale that folds ASCII only.
        .env("LC_ALL", "C")
        .env_remove("DATABASE_URL")
        .env_remove("DATABASE_URL_FILE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// A running `fast-zero postgres`, stopped by its lifeline on drop.
pub struct Postgres {
    pub process: Child,
    pub lifeline: Option<ChildStdin>,
    pub url: String,
}

impl Postgres {
    pub fn start(data_dir: &Path) -> Self {
        Self::run(fast_zero(&["postgres", "--lifeline"], data_dir))
    }

    pub fn temporary() -> Self {
        Self::run(fast_zero(&["postgres", "--lifeline", "--temporary"], Path::new("/nowhere")))
    }

    pub fn run(mut command: Command) -> Self {
        let mut process = command.spawn().expect("the program");
        let lifeline = process.stdin.take();
        let mut stdout = BufReader::new(process.stdout.take().expect("piped"));
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut line = String::new();
            let _ = stdout.read_line(&mut line);
            let _ = sender.send(line);
        });
        let line = receiver.recv_timeout(START_TIMEOUT).expect("a line in time");
        let url = line.trim_end().to_owned();
        assert!(url.starts_with("postgresql://"), "the first line is the URL: {url}");
        Self { process, lifeline, url }
    }

    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.expect("PostgreSQL accepts connections at the URL")
    }

    /// Returns one value as text.
    pub async fn fetch_scalar(&self, query: &'static str) -> String {
        sqlx::query_scalar(query).fetch_one(&mut self.connect().await).await.expect(query)
    }

    pub fn options(&self) -> PgConnectOptions {
        self.url.parse().expect("a URL")
    }

    pub fn socket_dir(&self) -> PathBuf {
        self.options().get_socket().expect("a socket").clone()
    }

    /// Stores a word, which [`stored`](Self::stored) returns.
    pub async fn store(&self, word: &str) {
        let mut connection = self.connect().await;
        sqlx::query("create table stored (word text)")
            .execute(&mut connection)
            .await
            .expect("a new table");
        let insert = sqlx::query("insert into stored values ($1)").bind(word);
        insert.execute(&mut connection).await.expect("a table");
    }

    pub async fn stored(&self) -> String {
        self.fetch_scalar("select word from stored").await
    }

    /// Returns the IDs of the processes in PostgreSQL's statistics, and last that of its main
    /// process.
    pub async fn processes(&self) -> Vec<i32> {
        let mut connection = self.connect().await;
        let mut pids: Vec<i32> = sqlx::query_scalar("select pid from pg_stat_activity")
            .fetch_all(&mut connection)
            .await
            .expect("the processes");
        let main = "select split_part(pg_read_file('postmaster.pid'), E'\n', 1)::int";
        pids.push(sqlx::query_scalar(main).fetch_one(&mut connection).await.expect(main));
        pids
    }

    /// Suspends all its processes by SIGSTOP until the guard is dropped: connections stay
    /// open, without a response.
    pub async fn freeze(&self) -> Frozen {
        let main = *self.processes().await.last().expect("the main process");
        // First the main process, which starts others.
        let mut frozen = Frozen(Vec::new());
        frozen.stop(main);
        for process in children(main) {
            frozen.stop(process);
        }
        frozen
    }

    /// Stops it by its lifeline.
    pub fn stop(mut self) -> ExitStatus {
        self.lifeline.take();
        self.wait()
    }

    pub fn wait(&mut self) -> ExitStatus {
        wait_until("the child has exited", || self.process.try_wait().expect("a child"))
    }

    /// Kills the child, but not PostgreSQL.
    pub fn kill(mut self) {
        self.process.kill().expect("a child");
        self.process.wait().expect("a child");
    }

    /// Kills PostgreSQL, whose data is in `data_dir`, and then the child.
    pub fn crash(self, data_dir: &Path) {
        let pid_file = fs::read_to_string(cluster_dir(data_dir).join("postmaster.pid"));
        let pid_file = pid_file.expect("a running process");
        let main = pid_file.lines().next().and_then(|pid| pid.parse().ok());
        kill(Pid::from_raw(main.expect("a number")), Signal::SIGKILL).expect("a running process");
        self.kill();
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        self.lifeline.take();
        if !thread::panicking() {
            self.wait();
        }
    }
}

/// Suspended processes, resumed on drop.
pub struct Frozen(Vec<Pid>);

impl Frozen {
    fn stop(&mut self, pid: i32) {
        let pid = Pid::from_raw(pid);
        // The process may have exited.
        if kill(pid, Signal::SIGSTOP).is_ok() {
            self.0.push(pid);
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

fn children(parent: i32) -> impl Iterator<Item = i32> {
    let processes = fs::read_dir("/proc").expect("a mounted volume").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(move |pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses precedes the state and the parent.
        let parent_of = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1));
        parent_of.and_then(|pid| pid.parse().ok()) == Some(parent)
    })
}

/// Waits until `poll` returns a value, at most [`STOP_TIMEOUT`].
pub fn wait_until<T>(event: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let started_at = Instant::now();
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(started_at.elapsed() < STOP_TIMEOUT, "{event}: not within {STOP_TIMEOUT:?}");
        thread::sleep(POLL_INTERVAL);
    }
}

pub fn wait_until_exited(processes: &[i32]) {
    wait_until("PostgreSQL has exited", || {
        (!processes.iter().any(|&pid| is_alive(pid))).then_some(())
    });
}

pub fn pid(process: &Child) -> Pid {
    Pid::from_raw(i32::try_from(process.id()).expect("a process"))
}

/// Returns `false` for a zombie, which has exited but is still in the process table.
pub fn is_alive(pid: i32) -> bool {
    let is_zombie = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|state| state.starts_with('Z'))
    };
    kill(Pid::from_raw(pid), None).is_ok() && !is_zombie()
}

/// Returns PostgreSQL's own data directory, whichever version it has.
pub fn cluster_dir(data_dir: &Path) -> PathBuf {
    find_cluster_dir(data_dir).expect("the directory of a version")
}

pub fn find_cluster_dir(data_dir: &Path) -> Option<PathBuf> {
    let versioned = |entry: &fs::DirEntry| {
        entry.file_name().to_string_lossy().starts_with("postgres-") && entry.path().is_dir()
    };
    Some(fs::read_dir(data_dir).ok()?.flatten().find(versioned)?.path())
}
