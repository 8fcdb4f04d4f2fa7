//! The PostgreSQL container of the tests ends with the run, even with a killed one.

use std::{env, process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    time::sleep,
};

use crate::support::{
    container,
    postgres::{TestDatabase, print_line},
    wait::{wait_until, with_timeout},
};

/// The environment variable that marks the run to kill.
const KILLED_RUN: &str = "FASTZERO_TEST_IS_TO_BE_KILLED";

#[tokio::test]
async fn a_killed_run_leaves_no_container() {
    if !container::is_available().await {
        print_line("SKIPPED: the end of the container: there is no engine that has the image");
        return;
    }
    let mut run = Command::new(env::current_exe().expect("this program"))
        .args(["--exact", "containers::postgres::waits_to_be_killed", "--ignored"])
        .env_remove("TEST_DATABASE_URL")
        .env(KILLED_RUN, "")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("a started process");
    let mut lines = BufReader::new(run.stderr.take().expect("a pipe")).lines();
    let line = with_timeout("a line about the container", lines.next_line()).await;
    let line = line.expect("text").expect("a line");
    let id = line.rsplit(' ').next().expect("the id is the last word");
    assert!(container::exists(id).await, "{line}");

    run.kill().await.expect("a running process");
    wait_until("the container is removed", async || !container::exists(id).await).await;
}

/// The run to kill, in its own process.
#[tokio::test]
#[ignore = "it does nothing but wait"]
async fn waits_to_be_killed() {
    if env::var_os(KILLED_RUN).is_none() {
        return;
    }
    let _database = TestDatabase::create().await;
    sleep(Duration::from_mins(1)).await;
}
