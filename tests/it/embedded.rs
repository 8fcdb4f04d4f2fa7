//! The private PostgreSQL, from outside: `fast-zero postgres` as a process.
//!
//! Each test has a data folder of its own; all share the fetched programs.

use std::{
    env,
    fs::{self, File, Permissions},
    io::Read,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Stdio,
    thread,
    time::Instant,
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::{Pid, geteuid},
};
use sqlx::{Connection, PgConnection, postgres::PgPoolOptions};

use crate::support::embedded::{
    PAUSE, Postgres, START_LIMIT, data_folder, fast_zero, find_data_folder, is_alive, pid, place,
    until, until_gone,
};

/// Runs a `fast-zero postgres` that is to fail, and returns what it says.
fn refused(data: &Path) -> String {
    let mut command = fast_zero(&["postgres", "--lifeline"], data);
    let mut child = command.stderr(Stdio::piped()).spawn().expect("the program");
    let status = until("it has given up", || child.try_wait().expect("a child"));
    assert!(!status.success());
    let mut said = [String::new(), String::new()];
    child.stdout.take().expect("piped").read_to_string(&mut said[0]).expect("text");
    child.stderr.take().expect("piped").read_to_string(&mut said[1]).expect("text");
    assert_eq!(said[0], "", "there is no URL");
    said[1].clone()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("a file").permissions().mode() & 0o777
}

#[tokio::test]
async fn it_is_durable_private_and_folds_case() {
    let place = place();
    let home = place.path().join("data");
    let postgres = Postgres::start(&home);
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
        assert_eq!(postgres.ask(query).await, expected, "{query}");
    }
    let version = data_folder(&home);
    assert_eq!(mode(&home), 0o700);
    assert_eq!(mode(&version), 0o700);
    assert_eq!(mode(&version.join("password")), 0o600);
    assert_eq!(mode(&postgres.socket_folder()), 0o700);

    let other = postgres.options().password("another");
    let error = PgConnection::connect_with(&other).await.expect_err("a wrong password");
    let code = error.as_database_error().and_then(|error| error.code().map(String::from));
    assert_eq!(code.as_deref(), Some("28P01"));
}

#[tokio::test]
async fn a_second_start_finds_the_data_and_needs_no_network() {
    let place = place();
    let home = place.path().join("d e\"e,p ç%&?");
    let postgres = Postgres::start(&home);
    assert!(postgres.socket_folder().starts_with(&home));
    postgres.keep("Olá").await;
    let url = postgres.url.clone();
    assert!(postgres.stop().success());

    let mut command = fast_zero(&["postgres", "--lifeline"], &home);
    command.env("HTTPS_PROXY", "http://127.0.0.1:9");
    let postgres = Postgres::run(command);
    assert_eq!(postgres.url, url);
    assert_eq!(postgres.kept().await, "Olá");
}

#[tokio::test]
async fn a_folder_that_is_in_use_or_no_data_folder_is_refused() {
    let place = place();
    let home = place.path().join("data");
    let postgres = Postgres::start(&home);
    let said = refused(&home);
    assert!(said.contains("in use"), "{said}");
    assert!(said.contains(&home.display().to_string()), "{said}");
    assert!(said.contains(&postgres.process.id().to_string()), "{said}");
    assert_eq!(postgres.ask("select 'well'").await, "well");
    assert!(postgres.stop().success());

    let version = data_folder(&home);
    fs::remove_file(version.join("PG_VERSION")).expect("PostgreSQL's mark");
    let said = refused(&home);
    assert!(said.contains(&version.display().to_string()), "{said}");
    assert!(version.join("base").is_dir(), "it is left alone");
}

#[test]
fn a_folder_that_cannot_be_used_is_a_clear_error() {
    // Root's own, where root runs the test: the child is another user then.
    let place = tempfile::tempdir_in("/tmp").expect("a temporary folder");
    let open = if geteuid().is_root() { 0o700 } else { 0o500 };
    fs::set_permissions(place.path(), Permissions::from_mode(open)).expect("its owner");
    let said = refused(place.path());
    assert!(said.contains(&place.path().display().to_string()), "{said}");
    assert!(said.contains("FASTZERO_DATA_DIR"), "{said}");
    assert_eq!(mode(place.path()), open, "it stays as it was");
}

#[tokio::test]
async fn a_folder_that_is_too_deep_for_a_socket_is_used() {
    let place = place();
    let home = place.path().join("d e\"e,p ç%".repeat(12)).join("data");
    let postgres = Postgres::start(&home);
    assert_eq!(postgres.ask("select 'well'").await, "well");
    let sockets = postgres.socket_folder();
    assert!(!sockets.starts_with(&home));
    assert_eq!(mode(&sockets), 0o700);
    assert!(postgres.stop().success());
    assert!(!sockets.exists());
}

#[tokio::test]
async fn nothing_is_left_after_a_signal_or_the_end_of_the_lifeline() {
    let place = place();
    let home = place.path().join("data");
    for signal in [None, Some(Signal::SIGINT), Some(Signal::SIGTERM), Some(Signal::SIGHUP)] {
        let flags: &[&str] = if signal.is_some() { &[] } else { &["--lifeline"] };
        let mut postgres = Postgres::run(fast_zero(&[&["postgres"], flags].concat(), &home));
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
        until_gone(&processes);
        query.await.expect("no panic").expect_err("the connection has ended");
    }
}

#[tokio::test]
async fn a_start_recovers_from_what_was_killed() {
    let place = place();
    let home = place.path().join("data");
    let postgres = Postgres::start(&home);
    postgres.keep("Olá").await;
    let processes = postgres.processes().await;
    postgres.kill();
    assert!(processes.iter().any(|&pid| is_alive(pid)), "PostgreSQL has outlived its child");

    let mut postgres = Postgres::start(&home);
    until_gone(&processes);
    assert_eq!(postgres.kept().await, "Olá");

    // The other way round, the child tells.
    let processes = postgres.processes().await;
    let main = *processes.last().expect("the main process");
    kill(Pid::from_raw(main), Signal::SIGKILL).expect("a process");
    assert!(!postgres.wait().success());
    until_gone(&processes);

    let pid_file = data_folder(&home).join("postmaster.pid");
    assert!(pid_file.is_file(), "a killed PostgreSQL leaves its pid file");
    assert_eq!(Postgres::start(&home).kept().await, "Olá");

    fs::write(&pid_file, "").expect("what a power failure may leave");
    assert_eq!(Postgres::start(&home).kept().await, "Olá");

    let reused = format!("{}\n{}\n0\n5432\n\n\n\nready\n", std::process::id(), home.display());
    fs::write(&pid_file, reused).expect("the number of another process");
    assert_eq!(Postgres::start(&home).kept().await, "Olá");
}

#[tokio::test]
async fn the_environment_does_not_reach_it() {
    let place = place();
    // Where the fetched programs are, which an ordinary user's environment tells.
    let cache = env::var_os("XDG_CACHE_HOME")
        .or_else(|| env::home_dir().map(|home| home.join(".cache").into()))
        .unwrap_or_default();
    let mut command = fast_zero(&["postgres", "--lifeline"], &place.path().join("data"));
    command
        .envs([("LC_ALL", "xx_YY.none"), ("LANG", "xx_YY.none"), ("TZ", "nowhere")])
        .envs([("PGHOST", "nowhere.invalid"), ("PGPORT", "1"), ("PGDATA", "/nowhere")])
        .envs([("PGOPTIONS", "-c fsync=off"), ("TMPDIR", "/nowhere"), ("HOME", "/nowhere")])
        .env("XDG_CACHE_HOME", cache);
    let postgres = Postgres::run(command);
    assert_eq!(postgres.ask("select lower('Ç')").await, "ç");
    assert_eq!(postgres.ask("show server_encoding").await, "UTF8");
    assert_eq!(postgres.ask("show timezone").await, "UTC");
    assert_eq!(postgres.ask("show fsync").await, "on");
}

#[tokio::test]
async fn temporary_ones_run_side_by_side_and_are_removed() {
    let [killed, stays] = [Postgres::temporary(), Postgres::temporary()];
    assert_eq!(stays.ask("show fsync").await, "off");
    assert_eq!(stays.ask("select lower('Ç')").await, "ç");
    let homes = [&killed, &stays].map(|postgres| {
        postgres.socket_folder().parent().expect("the temporary folder").to_owned()
    });
    assert_eq!(mode(&homes[1]), 0o700);

    // What a killed child leaves, the next one removes, and nothing else.
    let processes = killed.processes().await;
    killed.kill();
    let next = Postgres::temporary();
    until_gone(&processes);
    until("it is removed", || (!homes[0].exists()).then_some(()));
    assert_eq!(stays.ask("select 'well'").await, "well");

    let client = stays.connect().await;
    assert!(stays.stop().success());
    assert!(!homes[1].exists());
    drop(client);

    let pool = PgPoolOptions::new().max_connections(100).connect_lazy(&next.url).expect("a pool");
    let mut connections = Vec::new();
    for _ in 0..100 {
        connections.push(pool.acquire().await.expect("a connection"));
    }
}

#[tokio::test]
async fn nothing_is_left_of_a_server_that_was_killed_or_stopped() {
    let place = place();
    let home = place.path().join("data");
    let serve = || {
        let mut server = fast_zero(&["serve"], &home);
        server.env("LISTEN_ADDR", "127.0.0.1:0").process_group(0);
        server.env_remove("SECRET_KEY").env_remove("SECRET_KEY_FILE");
        server.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("the program")
    };
    let mut server = serve();
    let main = main_process(&home);
    server.kill().expect("a child");
    server.wait().expect("a child");
    until_gone(&[main]);
    until("the child has ended", || {
        File::open(home.join("lock")).expect("the lock").try_lock().ok()
    });

    let mut server = serve();
    let main = main_process(&home);
    // As Ctrl-C at a terminal does.
    killpg(pid(&server), Signal::SIGINT).expect("a group");
    let status = until("the server has ended", || server.try_wait().expect("a child"));
    assert!(status.success(), "{status}");
    until_gone(&[main]);
}

/// Waits until PostgreSQL is ready in a folder, and returns its main process.
fn main_process(home: &Path) -> i32 {
    let began = Instant::now();
    while began.elapsed() < START_LIMIT {
        let pid_file = find_data_folder(home).map(|folder| folder.join("postmaster.pid"));
        let text = pid_file.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
        if text.lines().nth(7).is_some_and(|state| state.trim() == "ready") {
            return text.lines().next().expect("a line").parse().expect("a number");
        }
        thread::sleep(PAUSE);
    }
    panic!("PostgreSQL has not started");
}
