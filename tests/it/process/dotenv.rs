//! The file `.env`.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
};

use nix::unistd::geteuid;
use tokio::process::Command;

use crate::support::{app::SECRET_KEY, postgres::TestDatabase, process::Binary};

const CONFIG: Option<i32> = Some(78);
const NO_CONNECTION: Option<i32> = Some(2);

/// A file of another program, with lines that are no assignments.
const FOREIGN: &str = "APP_NAME=My App\nMOTD=Don't\n[section]\nA=${B\nQUOTED=\"Don't\n";

#[tokio::test]
async fn a_damaged_env_file_is_named_but_not_shown() {
    let run = Binary::new(&[]).file(".env", "SECRET_KEY='hidden\nthis is no assignment\n");
    let (code, output) = run.output().await;
    assert_eq!(code, CONFIG, "{output}");
    assert!(output.contains(".env"), "{output}");
    assert!(!output.contains("hidden") && !output.contains("assignment"), "{output}");
}

#[tokio::test]
async fn an_invalid_line_is_named_by_its_number() {
    for (line, problem) in [
        ("SECRET_KEY='hidden", "SECRET_KEY must end with the quote"),
        ("export SECRET_KEY hidden", "SECRET_KEY must be followed by ="),
        ("LISTEN_ADDR=${hidden", "LISTEN_ADDR must have variables like ${NAME}"),
        ("PGSSLMODE='hidden", "PGSSLMODE must end with the quote"),
    ] {
        let run = Binary::new(&[]).file(".env", &format!("{FOREIGN}{line}\n"));
        let (code, output) = run.output().await;
        assert_eq!(code, CONFIG, "{line}: {output}");
        assert!(output.contains(&format!("error: .env, line 6: {problem}")), "{output}");
        assert!(!output.contains("hidden"), "{output}");
    }
}

/// As in the image with another user, or after `sudo -u` in a home directory.
#[tokio::test]
async fn a_working_directory_without_access_stops_no_subcommand() {
    let dir = tempfile::tempdir().expect("a directory");
    // Root without these capabilities is subject to permissions.
    let without_capabilities = if geteuid().is_root() {
        "setpriv --bounding-set -dac_override,-dac_read_search"
    } else {
        ""
    };
    let script = format!("chmod 000 . && exec {without_capabilities} \"$0\" migrate");
    let run = Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_fast-zero")])
        .env("DATABASE_URL", "mysql://database")
        .current_dir(&dir)
        .output();
    let output = run.await.expect("a shell");
    fs::set_permissions(&dir, Permissions::from_mode(0o700)).expect("an owner");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), CONFIG, "{errors}");
    assert!(errors.contains("DATABASE_URL") && !errors.contains(".env"), "{errors}");
}

#[tokio::test]
async fn a_file_in_utf_16_is_rejected() {
    for mark in [b"\xff\xfe", b"\xfe\xff"] {
        let content = [mark, &b"A\0=\0"[..]].concat();
        let run = Binary::new(&["healthcheck"]).file_of_bytes(".env", &content);
        let (code, output) = run.output().await;
        assert_eq!(code, CONFIG, "{output}");
        assert!(output.contains(".env must be UTF-8 text, not UTF-16"), "{output}");
    }
}

#[tokio::test]
async fn help_version_and_methods_do_not_read_the_file() {
    for arguments in
        [&["--help"][..], &["--version"], &["help"], &["serve", "--help"], &["-V"], &["methods"]]
    {
        let run = Binary::new(arguments).file(".env", "SECRET_KEY='hidden\n");
        let (code, output) = run.output().await;
        assert_eq!(code, Some(0), "{arguments:?}: {output}");
        assert!(!output.contains("hidden"), "{output}");
    }
}

#[tokio::test]
async fn a_file_of_another_program_stops_no_subcommand() {
    // The healthcheck has no SECRET_KEY.
    for file in [FOREIGN, "SECRET_KEY='hidden\n", "\u{feff}", "\0"] {
        let address = format!("{file}\nLISTEN_ADDR=127.0.0.1:1\n");
        let (code, output) = Binary::new(&["healthcheck"]).file(".env", &address).output().await;
        assert_eq!(code, NO_CONNECTION, "{file:?}: {output}");
        assert!(output.contains("127.0.0.1:1: cannot connect"), "{file:?}: {output}");
    }
    // A virtual environment of Python.
    let directory = Binary::new(&["healthcheck", "--addr", "127.0.0.1:1"]);
    let (code, output) = directory.file(".env/pyvenv.cfg", "home = /usr\n").output().await;
    assert_eq!(code, NO_CONNECTION, "{output}");

    let database = TestDatabase::create().await;
    let file = format!("{FOREIGN}DATABASE_URL='{}'\r\nLOG_FORMAT=json\r\n", database.url());
    let file = format!("{file}LISTEN_ADDR=127.0.0.1:0\nSECRET_KEY=short\nSECRET_KEY={SECRET_KEY}");
    Binary::new(&[]).file(".env", &file).start().address().await;
}

#[tokio::test]
async fn the_last_line_of_a_variable_counts_and_may_use_others() {
    let file = "LISTEN_ADDR=first\nPORT=${UNSET:-last}\nexport LISTEN_ADDR=\"$HOST:$PORT\" # all\n";
    let run = Binary::new(&[]).file(".env", file).env("HOST", "the");
    let (code, output) = run.output().await;
    assert_eq!(code, CONFIG, "{output}");
    assert!(output.contains("'the:last' for '--listen-addr"), "{output}");
}

#[tokio::test]
async fn variables_of_libpq_may_be_in_the_file() {
    let file = format!("DATABASE_URL=postgresql:///app\nPGPORT=none\nSECRET_KEY='{SECRET_KEY}'\n");
    let (code, output) = Binary::new(&["serve"]).file(".env", &file).output().await;
    assert_eq!(code, CONFIG, "{output}");
    assert!(output.contains("PGPORT must be a number"), "{output}");
}
