//! The embedded PostgreSQL, from outside: `fast-zero postgres` as a process.
//!
//! Each test has its own data directory; all use the same downloaded programs.

use std::{
    env,
    fs::{self, File, Permissions},
    io::Read,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Instant,
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::{Pid, geteuid},
};
use sqlx::{Connection, PgConnection, postgres::PgPoolOptions};

use crate::support::embedded::{
    POLL_INTERVAL, Postgres, START_TIMEOUT, cluster_dir, fast_zero, find_cluster_dir, is_alive,
    pid, temp_dir, wait_until, wait_until_exited,
};

/// Runs a `fast-zero postgres` that must fail, and returns its standard error.
fn failure(data_dir: &Path) -> String {
    let mut command = fast_zero(&["postgres", "--lifeline"], data_dir);
    let mut child = command.stderr(Stdio::piped()).spawn().expect("the program");
    let status = wait_until("the process has exited", || child.try_wait().expect("a child"));
    assert!(!status.success());
    let (mut stdout, mut stderr) = (String::new(), String::new());
    child.stdout.take().expect("piped").read_to_string(&mut stdout).expect("text");
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("text");
    assert_eq!(stdout, "", "there is no URL");
    stderr
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("a file").permissions().mode() & 0o777
}

#[tokio::test]
async fn it_is_durable_private_and_folds_case() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    let postgres = Postgres::start(&data_dir);
    for (query, expected) in [
        ("show fsync", "on"),
        ("show full_page_writes", "on"),
        ("show synchronous_commit", "on"),
        ("show listen_addresses", ""),
        ("show server_encoding", "UTF8"),
        ("select lower('ÇÃÉ')", "çãé"),
        ("select ('Ação' ilike 'aÇÃO')::text", "true"),
        ("select current_database()::text", "fast_zero"),
        ("select string_agg(distinct auth_method, ' ') from pg_hba_file_rules", "scram-sha-256"),
    ] {
        assert_eq!(postgres.fetch_scalar(query).await, expected, "{query}");
    }
    let cluster = cluster_dir(&data_dir);
    assert_eq!(mode(&data_dir), 0o700);
    assert_eq!(mode(&cluster), 0o700);
    assert_eq!(mode(&cluster.join("password")), 0o600);
    assert_eq!(mode(&postgres.socket_dir()), 0o700);

    let other = postgres.options().password("another");
    let error = PgConnection::connect_with(&other).await.expect_err("a wrong password");
    let code = error.as_database_error().and_then(|error| error.code().map(String::from));
    assert_eq!(code.as_deref(), Some("28P01"));
}

#[tokio::test]
async fn a_second_start_finds_the_data_and_needs_no_network() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("d e\"e,p ç%&?");
    let postgres = Postgres::start(&data_dir);
    assert!(postgres.socket_dir().starts_with(&data_dir));
    postgres.store("Olá").await;
    let url = postgres.url.clone();
    assert!(postgres.stop().success());

    let mut command = fast_zero(&["postgres", "--lifeline"], &data_dir);
    command.env("HTTPS_PROXY", "http://127.0.0.1:9");
    let postgres = Postgres::run(command);
    assert_eq!(postgres.url, url);
    assert_eq!(postgres.stored().await, "Olá");
}

#[tokio::test]
async fn a_directory_in_use_or_not_of_postgresql_is_rejected() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    let postgres = Postgres::start(&data_dir);
    let message = failure(&data_dir);
    assert!(message.contains("in use"), "{message}");
    assert!(message.contains(&data_dir.display().to_string()), "{message}");
    assert!(message.contains(&postgres.process.id().to_string()), "{message}");
    assert_eq!(postgres.fetch_scalar("select 'well'").await, "well");
    assert!(postgres.stop().success());

    let cluster = cluster_dir(&data_dir);
    fs::remove_file(cluster.join("PG_VERSION")).expect("the version file");
    let message = failure(&data_dir);
    assert!(message.contains(&cluster.display().to_string()), "{message}");
    assert!(cluster.join("base").is_dir(), "it is not changed");
}

#[test]
fn data_of_a_version_that_is_not_installed_is_not_replaced_by_an_empty_database() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    // Older than any version that an installation is searched for.
    let cluster = data_dir.join("postgres-13");
    fs::create_dir_all(&cluster).expect("created");
    fs::write(cluster.join("PG_VERSION"), "13\n").expect("written");
    for dir in [&data_dir, &cluster] {
        fs::set_permissions(dir, Permissions::from_mode(0o777)).expect("an owner");
    }
    let message = failure(&data_dir);
    assert!(message.contains("data of PostgreSQL 13"), "{message}");
    assert!(message.contains("FASTZERO_DATA_DIR"), "{message}");
    let clusters = fs::read_dir(&data_dir).expect("readable").filter_map(Result::ok);
    let clusters = clusters.filter(|it| it.file_name().to_string_lossy().starts_with("postgres-"));
    assert!(clusters.filter(|it| it.path().is_dir()).count() == 1, "none is created");
}

#[test]
fn a_directory_without_access_is_a_clear_error() {
    // If root runs the test, the child is another user, without access to root's directory.
    let temp_dir = tempfile::tempdir_in("/tmp").expect("a temporary directory");
    let expected_mode = if geteuid().is_root() { 0o700 } else { 0o500 };
    fs::set_permissions(temp_dir.path(), Permissions::from_mode(expected_mode)).expect("an owner");
    let message = failure(temp_dir.path());
    assert!(message.contains(&temp_dir.path().display().to_string()), "{message}");
    assert!(message.contains("FASTZERO_DATA_DIR"), "{message}");
    assert_eq!(mode(temp_dir.path()), expected_mode, "it is not changed");
}

#[tokio::test]
async fn a_path_too_long_for_a_socket_is_supported() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("d e\"e,p ç%".repeat(12)).join("data");
    let postgres = Postgres::start(&data_dir);
    assert_eq!(postgres.fetch_scalar("select 'well'").await, "well");
    let socket_dir = postgres.socket_dir();
    assert!(!socket_dir.starts_with(&data_dir));
    assert_eq!(mode(&socket_dir), 0o700);
    assert!(postgres.stop().success());
    assert!(!socket_dir.exists());
}

#[tokio::test]
async fn no_process_is_left_after_a_signal_or_the_end_of_the_lifeline() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    for signal in [None, Some(Signal::SIGINT), Some(Signal::SIGTERM), Some(Signal::SIGHUP)] {
        let flags: &[&str] = if signal.is_some() { &[] } else { &["--lifeline"] };
        let mut postgres = Postgres::run(fast_zero(&[&["postgres"], flags].concat(), &data_dir));
        let pool = PgPoolOptions::new().min_connections(3).connect(&postgres.url).await;
        let mut busy = pool.expect("a pool").acquire().await.expect("a connection");
        let query =
            tokio::spawn(
                async move { sqlx::query("select pg_sleep(60)").execute(&mut *busy).await },
            );
        let processes = postgres.processes().await;
        if let Some(signal) = signal {
            kill(pid(&postgres.process), signal).expect("a child");
        } else {
            postgres.lifeline.take();
        }
        assert!(postgres.wait().success(), "{signal:?}");
        wait_until_exited(&processes);
        query.await.expect("no panic").expect_err("the connection is closed");
    }
}

#[tokio::test]
async fn a_start_waits_for_a_process_that_is_stopping() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    let mut stopping = Postgres::start(&data_dir);
    stopping.store("Olá").await;
    stopping.lifeline.take();
    assert_eq!(Postgres::start(&data_dir).stored().await, "Olá");
    assert!(stopping.wait().success());
}

/// A shell starts it as `nohup` does.
#[tokio::test]
async fn nohup_disables_the_signal_of_a_closed_terminal() {
    let temp_dir = temp_dir();
    let mut command = Command::new("sh");
    let fast_zero = fast_zero(&[], &temp_dir.path().join("data"));
    let variables = fast_zero.get_envs().filter_map(|(name, value)| Some((name, value?)));
    command
        .args(["-c", "trap '' HUP; exec \"$0\" postgres"])
        .arg(fast_zero.get_program())
        .current_dir("/")
        .envs(variables)
        .env("RUST_LOG", "info")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut postgres = Postgres::run(command);
    let mut stderr = postgres.process.stderr.take().expect("piped");
    for signal in [Signal::SIGHUP, Signal::SIGTERM] {
        let mut connection = postgres.connect().await;
        kill(pid(&postgres.process), signal).expect("a child");
        // Fails when the connection is closed.
        let _ = sqlx::query("select pg_sleep(0.2)").execute(&mut connection).await;
    }
    assert!(postgres.wait().success());
    let mut log = String::new();
    stderr.read_to_string(&mut log).expect("text");
    assert!(log.contains("SIGTERM") && !log.contains("SIGHUP"), "{log}");
}

#[tokio::test]
async fn a_start_recovers_from_killed_processes() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    let postgres = Postgres::start(&data_dir);
    postgres.store("Olá").await;
    let processes = postgres.processes().await;
    postgres.kill();
    assert!(processes.iter().any(|&pid| is_alive(pid)), "PostgreSQL has outlived its child");

    let mut postgres = Postgres::start(&data_dir);
    wait_until_exited(&processes);
    assert_eq!(postgres.stored().await, "Olá");

    // If PostgreSQL is killed, the child fails.
    let processes = postgres.processes().await;
    let main = *processes.last().expect("the main process");
    kill(Pid::from_raw(main), Signal::SIGKILL).expect("a process");
    assert!(!postgres.wait().success());
    wait_until_exited(&processes);

    let pid_file = cluster_dir(&data_dir).join("postmaster.pid");
    assert!(pid_file.is_file(), "a killed PostgreSQL leaves its pid file");
    assert_eq!(Postgres::start(&data_dir).stored().await, "Olá");

    fs::write(&pid_file, "").expect("truncated as by a power failure");
    assert_eq!(Postgres::start(&data_dir).stored().await, "Olá");

    let reused = format!("{}\n{}\n0\n5432\n\n\n\nready\n", std::process::id(), data_dir.display());
    fs::write(&pid_file, reused).expect("the ID of another process");
    assert_eq!(Postgres::start(&data_dir).stored().await, "Olá");
}

#[tokio::test]
async fn postgresql_inherits_no_environment() {
    let temp_dir = temp_dir();
    // An unprivileged user's environment contains the path of the downloaded programs.
    let cache = env::var_os("XDG_CACHE_HOME")
        .or_else(|| env::home_dir().map(|home| home.join(".cache").into()))
        .unwrap_or_default();
    let mut command = fast_zero(&["postgres", "--lifeline"], &temp_dir.path().join("data"));
    command
        .envs([("LC_ALL", "xx_YY.none"), ("LANG", "xx_YY.none"), ("TZ", "nowhere")])
        .envs([("PGHOST", "nowhere.invalid"), ("PGPORT", "1"), ("PGDATA", "/nowhere")])
        .envs([("PGOPTIONS", "-c fsync=off"), ("TMPDIR", "/nowhere"), ("HOME", "/nowhere")])
        .env("XDG_CACHE_HOME", cache);
    let postgres = Postgres::run(command);
    assert_eq!(postgres.fetch_scalar("select lower('Ç')").await, "ç");
    assert_eq!(postgres.fetch_scalar("show server_encoding").await, "UTF8");
    assert_eq!(postgres.fetch_scalar("show timezone").await, "UTC");
    assert_eq!(postgres.fetch_scalar("show fsync").await, "on");
}

#[tokio::test]
async fn ephemeral_directories_are_independent_and_removed() {
    let [killed, other] = [Postgres::temporary(), Postgres::temporary()];
    assert_eq!(other.fetch_scalar("show fsync").await, "off");
    assert_eq!(other.fetch_scalar("select lower('Ç')").await, "ç");
    let dirs = [&killed, &other].map(|postgres| {
        postgres.socket_dir().parent().expect("the temporary directory").to_owned()
    });
    assert_eq!(mode(&dirs[1]), 0o700);

    // The next child removes what a killed one left, and nothing else.
    let processes = killed.processes().await;
    killed.kill();
    let next = Postgres::temporary();
    wait_until_exited(&processes);
    wait_until("the container is removed", || (!dirs[0].exists()).then_some(()));
    assert_eq!(other.fetch_scalar("select 'well'").await, "well");

    let client = other.connect().await;
    assert!(other.stop().success());
    assert!(!dirs[1].exists());
    drop(client);

    let pool = PgPoolOptions::new().max_connections(100).connect_lazy(&next.url).expect("a pool");
    let mut connections = Vec::new();
    for _ in 0..100 {
        connections.push(pool.acquire().await.expect("a connection"));
    }
}

#[tokio::test]
async fn no_process_is_left_of_a_killed_or_stopped_server() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    let mut server = serve(&data_dir);
    let main = main_process(&data_dir);
    server.kill().expect("a child");
    server.wait().expect("a child");
    wait_until_exited(&[main]);
    wait_until("the child has exited", || {
        File::open(data_dir.join("lock")).expect("the lock").try_lock().ok()
    });

    let mut server = serve(&data_dir);
    let main = main_process(&data_dir);
    // Ctrl-C at a terminal signals the whole group.
    killpg(pid(&server), Signal::SIGINT).expect("a group");
    let status = wait_until("the server has exited", || server.try_wait().expect("a child"));
    assert!(status.success(), "{status}");
    wait_until_exited(&[main]);
}

#[test]
fn a_server_that_rejects_its_stored_signing_key_stops_postgresql_first() {
    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    Postgres::start(&data_dir).stop();
    fs::write(data_dir.join("secret_key"), "short").expect("a file");
    let status = serve(&data_dir).wait().expect("a child");
    assert_eq!(status.code(), Some(1));
    let lock = File::open(data_dir.join("lock")).expect("the lock");
    lock.try_lock().expect("the directory is not in use");
}

/// Starts a server on the embedded PostgreSQL, with the signing key in the data directory.
fn serve(data_dir: &Path) -> Child {
    let mut server = fast_zero(&["serve"], data_dir);
    server.env("LISTEN_ADDR", "127.0.0.1:0").process_group(0);
    server.env_remove("SECRET_KEY").env_remove("SECRET_KEY_FILE");
    server.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the program")
}

/// Waits until PostgreSQL is ready in a data directory, and returns the ID of its main
/// process.
fn main_process(data_dir: &Path) -> i32 {
    let started_at = Instant::now();
    while started_at.elapsed() < START_TIMEOUT {
        let pid_file = find_cluster_dir(data_dir).map(|dir| dir.join("postmaster.pid"));
        let text = pid_file.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
        if text.lines().nth(7).is_some_and(|state| state.trim() == "ready") {
            return text.lines().next().expect("a line").parse().expect("a number");
        }
        thread::sleep(POLL_INTERVAL);
    }
    panic!("PostgreSQL has not started");
}
