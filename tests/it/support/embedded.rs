//! The private PostgreSQL, from outside: `fast-zero postgres` as a process.

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

/// A first start fetches PostgreSQL.
pub const START_LIMIT: Duration = Duration::from_mins(10);
/// What the documentation promises: no process of PostgreSQL's is left after it.
pub const END_LIMIT: Duration = Duration::from_secs(5);
pub const PAUSE: Duration = Duration::from_millis(10);

/// A place for data folders that every user can enter; a test run by root has the
/// child become another user.
pub fn place() -> TempDir {
    let place = tempfile::tempdir_in("/tmp").expect("a temporary folder");
    fs::set_permissions(place.path(), Permissions::from_mode(0o755)).expect("its owner");
    place
}

/// `fast-zero` with arguments, away from the `.env` of this repository.
pub fn fast_zero(arguments: &[&str], data: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fast-zero"));
    command
        .args(arguments)
        .current_dir("/")
        .env("FASTZERO_DATA_DIR", data)
        .env("RUST_LOG", "warn")
        // The worst of the usual locales: by itself it folds only ASCII.
        .env("LC_ALL", "C")
        .env_remove("DATABASE_URL")
        .env_remove("DATABASE_URL_FILE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// A `fast-zero postgres` that runs. Dropped, it ends by its lifeline.
pub struct Postgres {
    pub process: Child,
    pub lifeline: Option<ChildStdin>,
    pub url: String,
}

impl Postgres {
    pub fn start(data: &Path) -> Self {
        Self::run(fast_zero(&["postgres", "--lifeline"], data))
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
        let line = receiver.recv_timeout(START_LIMIT).expect("an answer in time");
        let url = line.trim_end().to_owned();
        assert!(url.starts_with("postgresql://"), "the URL is the first that is printed: {url}");
        Self { process, lifeline, url }
    }

    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.expect("PostgreSQL answers at the URL")
    }

    /// One value as text.
    pub async fn ask(&self, query: &'static str) -> String {
        sqlx::query_scalar(query).fetch_one(&mut self.connect().await).await.expect(query)
    }

    pub fn options(&self) -> PgConnectOptions {
        self.url.parse().expect("a URL")
    }

    pub fn socket_folder(&self) -> PathBuf {
        self.options().get_socket().expect("a socket").clone()
    }

    /// Writes a row, and reads it.
    pub async fn keep(&self, word: &str) {
        let mut connection = self.connect().await;
        sqlx::query("create table kept (word text)").execute(&mut connection).await.expect("new");
        let insert = sqlx::query("insert into kept values ($1)").bind(word);
        insert.execute(&mut connection).await.expect("a table");
    }

    pub async fn kept(&self) -> String {
        self.ask("select word from kept").await
    }

    /// The numbers of all processes of PostgreSQL's that have one in its statistics, and
    /// of the main one.
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

    /// Stops all its processes by SIGSTOP, until the guard is dropped: nothing is closed, and
    /// nothing answers.
    pub async fn freeze(&self) -> Frozen {
        let main = *self.processes().await.last().expect("the main one");
        // First the one that starts others.
        let mut frozen = Frozen(Vec::new());
        frozen.stop(main);
        for process in children(main) {
            frozen.stop(process);
        }
        frozen
    }

    /// Ends it by its lifeline.
    pub fn stop(mut self) -> ExitStatus {
        self.lifeline.take();
        self.wait()
    }

    pub fn wait(&mut self) -> ExitStatus {
        until("the child has ended", || self.process.try_wait().expect("a child"))
    }

    /// Kills it, but not PostgreSQL.
    pub fn kill(mut self) {
        self.process.kill().expect("a child");
        self.process.wait().expect("a child");
    }

    /// Kills PostgreSQL, whose data are in `home`, and then it.
    pub fn crash(self, home: &Path) {
        let pid_file = fs::read_to_string(data_folder(home).join("postmaster.pid"));
        let pid_file = pid_file.expect("it runs");
        let main = pid_file.lines().next().and_then(|pid| pid.parse().ok());
        kill(Pid::from_raw(main.expect("a number")), Signal::SIGKILL).expect("it runs");
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

/// Processes that are stopped.
pub struct Frozen(Vec<Pid>);

impl Frozen {
    fn stop(&mut self, pid: i32) {
        let pid = Pid::from_raw(pid);
        // It may have ended by itself.
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
    let processes = fs::read_dir("/proc").expect("it is mounted").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(move |pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // After the name in brackets: the state, the parent.
        let parent_of = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').nth(1));
        parent_of.and_then(|pid| pid.parse().ok()) == Some(parent)
    })
}

/// Waits for something that is to happen within [`END_LIMIT`].
pub fn until<T>(what: &str, mut happened: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = happened() {
            return value;
        }
        assert!(began.elapsed() < END_LIMIT, "{what}: not within {END_LIMIT:?}");
        thread::sleep(PAUSE);
    }
}

pub fn until_gone(processes: &[i32]) {
    until("PostgreSQL has ended", || (!processes.iter().any(|&pid| is_alive(pid))).then_some(()));
}

pub fn pid(process: &Child) -> Pid {
    Pid::from_raw(i32::try_from(process.id()).expect("a process"))
}

/// A process that has ended, but that nobody has waited for, is not alive.
pub fn is_alive(pid: i32) -> bool {
    let ended = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|state| state.starts_with('Z'))
    };
    kill(Pid::from_raw(pid), None).is_ok() && !ended()
}

/// The data folder of PostgreSQL's own, whichever version it is.
pub fn data_folder(home: &Path) -> PathBuf {
    find_data_folder(home).expect("a folder of a version")
}

pub fn find_data_folder(home: &Path) -> Option<PathBuf> {
    let versioned = |entry: &fs::DirEntry| {
        entry.file_name().to_string_lossy().starts_with("postgres-") && entry.path().is_dir()
    };
    Some(fs::read_dir(home).ok()?.flatten().find(versioned)?.path())
}
