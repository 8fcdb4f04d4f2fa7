//! The file `.env`.

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
