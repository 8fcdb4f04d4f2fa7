//! `fast-zero user`: what an operator does with users.

use std::{fs::File, io::Write};

use nix::pty::openpty;
use serde_json::Value;

use crate::support::{
    App, Client, PASSWORD,
    app::connect,
    assert::{assert_status, assert_unauthenticated},
    operator::user_command,
    postgres::TestDatabase,
    process::Binary,
};

const NO_SUCH_USER: Option<i32> = Some(3);
const USAGE: Option<i32> = Some(64);
const CONFIG: Option<i32> = Some(78);

const OBSERVABILITY: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/observability.md"));

const OPERATIONS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md"));

const COMMANDS: [&str; 6] = ["list", "show", "disable", "enable", "reset-password", "delete"];

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Returns the usernames of a list in JSON.
fn usernames(list: &str) -> Vec<String> {
    let list = json(list);
    let users = list["users"].as_array().expect("users");
    users.iter().map(|user| user["username"].as_str().expect("text").to_owned()).collect()
}

#[tokio::test]
async fn users_are_listed_in_an_aligned_table_or_as_json() {
    let app = App::start().await;
    assert_eq!(app.operate(&["list"]).await, "USERNAME  EMAIL  CREATED  DISABLED  ID\n");
    assert_eq!(json(&app.operate(&["list", "--json"]).await)["users"], Value::Array(Vec::new()));
    let ana = app.create_user("ana").await;
    let bob = app.create_user("Bob-with-a-long-name").await;
    app.operate(&["disable", "ana"]).await;

    let table = app.operate(&["list"]).await;
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    for (heading, cells) in [
        ("USERNAME", ["ana", &bob.username]),
        ("EMAIL", ["ana@example.com", &bob.email]),
        ("ID", [&ana.id, &bob.id]),
    ] {
        let column = lines[0].rfind(heading).expect("a column");
        for (line, cell) in lines[1..].iter().zip(cells) {
            assert!(line[column..].starts_with(cell), "{heading}:\n{table}");
        }
    }
    let column = lines[0].find("DISABLED").expect("a column");
    assert!(
        lines[1][column..].starts_with("20") && lines[2][column..].starts_with("- "),
        "{table}"
    );

    let list = json(&app.operate(&["list", "--json"]).await);
    let fields: Vec<_> = list["users"][1].as_object().expect("a user").keys().collect();
    let expected = ["create_time", "disabled_time", "email", "id", "update_time", "username"];
    assert_eq!(fields, expected);
    assert_eq!(list["users"][1]["id"], bob.id.as_str());
    assert_eq!(list["users"][1]["disabled_time"], Value::Null);
    assert!(list["users"][0]["disabled_time"].as_str().expect("a time").ends_with('Z'));
}

#[tokio::test]
async fn a_list_has_all_users_on_pages() {
    let app = App::start().await;
    app.insert_users(1_001).await;
    let all = usernames(&app.operate(&["list", "--json"]).await);
    assert_eq!(all, (1..=1_001).map(|number| format!("user{number}")).collect::<Vec<_>>());
    assert_eq!(app.operate(&["list"]).await.lines().count(), 1 + 1_001);
    // No statement lists more.
    let log = user_command(&app.database, &["list"]).env("RUST_LOG", "sqlx::query=debug");
    let (_, _, log) = log.outputs().await;
    let lists = log.lines().filter(|line| line.contains("order by id limit"));
    let rows: Vec<_> = lists.map(|line| json(line)["rows_returned"].as_u64()).collect();
    assert_eq!(rows, [Some(500), Some(500), Some(1)], "{log}");
}

#[tokio::test]
async fn a_user_who_is_deleted_in_the_meantime_does_not_exist() {
    for arguments in [
        &["disable", "ana"][..],
        &["enable", "ana"],
        &["reset-password", "ana"],
        &["delete", "ana", "--yes"],
    ] {
        let app = App::start().await;
        app.create_user("ana").await;
        let mut lock = app.hold_lock("delete from users").await;
        let run = user_command(&app.database, arguments);
        let run = tokio::spawn(async move { run.outputs().await });
        lock.wait_until_blocking().await;
        lock.release().await;
        let (code, stdout, stderr) = run.await.expect("no panic");
        assert_eq!((code, &*stdout), (NO_SUCH_USER, ""), "{arguments:?}: {stderr}");
        assert!(stderr.contains("the user was deleted in the meantime"), "{arguments:?}: {stderr}");
    }
}

#[tokio::test]
async fn a_closed_pipe_is_a_success_for_a_list_only() {
    let app = App::start().await;
    app.create_user("ana").await;
    for (arguments, expected) in [(&["list"][..], 0), (&["reset-password", "ana"], 1)] {
        let arguments = format!("user {} | true; exit ${{PIPESTATUS[0]}}", arguments.join(" "));
        let run = Binary::in_bash(&arguments).env("DATABASE_URL", &app.database.url());
        let (code, output) = run.output().await;
        assert_eq!(code, Some(expected), "{arguments}: {output}");
    }
}

#[tokio::test]
async fn a_query_finds_a_part_of_a_username_or_email_in_any_case() {
    let app = App::start().await;
    for name in ["ana", "Bob", "a_b"] {
        app.create_user(name).await;
    }
    for (query, found) in [
        ("", &["ana", "Bob", "a_b"][..]),
        ("B", &["Bob", "a_b"]),
        ("BOB@", &["Bob"]),
        ("example.COM", &["ana", "Bob", "a_b"]),
        ("_", &["a_b"]),
        ("%", &[]),
    ] {
        let list = app.operate(&["list", "--json", "--query", query]).await;
        assert_eq!(usernames(&list), found, "{query}");
    }
}

#[tokio::test]
async fn a_user_is_shown_by_any_name_with_what_the_user_owns() {
    let app = App::start().await;
    let ana = app.signed_up("Ana").await;
    app.logged_in("ana").await;
    ana.create_todo("a").await;
    let id = ana.user_id();
    for name in ["ana", "ANA@example.com", &id, &id.to_uppercase()] {
        let user = json(&app.operate(&["show", "--json", name]).await);
        assert_eq!(user["id"], ana.user_id().as_str());
        assert_eq!((&user["username"], &user["email"]), (&"Ana".into(), &"Ana@example.com".into()));
        for (field, number) in [("todos", 1), ("active_sessions", 2), ("personal_access_tokens", 0)]
        {
            assert_eq!(user[field], number, "{field}");
        }
        for field in ["disabled_time", "reset_code_expire_time"] {
            assert_eq!(user[field], Value::Null, "{field}");
        }
    }
    app.reset_code("ana").await;
    let user = json(&app.operate(&["show", "--json", "ana"]).await);
    assert!(user["reset_code_expire_time"].is_string(), "{user}");
    let text = app.operate(&["show", "ana"]).await;
    for line in
        ["USERNAME                Ana", "TODOS                   1", "DISABLED                -"]
    {
        assert!(text.lines().any(|it| it == line), "{line} is not in:\n{text}");
    }
}

#[tokio::test]
async fn an_unknown_user_has_an_exit_code_of_its_own() {
    let app = App::start().await;
    for command in &COMMANDS[1..] {
        for name in ["stranger", "a@b", "", "00000000-0000-7000-8000-000000000000", "a\nb"] {
            let arguments = [*command, name, "--yes"];
            let arguments = &arguments[..if *command == "delete" { 3 } else { 2 }];
            let run = user_command(&app.database, arguments);
            let (code, stdout, stderr) = run.outputs().await;
            assert_eq!((code, &*stdout), (NO_SUCH_USER, ""), "{arguments:?}: {stderr}");
            assert!(stderr.contains("no user has this username, email address or ID"), "{stderr}");
        }
    }
}

#[tokio::test]
async fn wrong_usage_is_refused_before_anything_happens() {
    let long = "a".repeat(255);
    for (arguments, part) in [
        (&["user"][..], "Usage: fast-zero user <COMMAND>"),
        (&["user", "remove", "ana"], "unrecognized subcommand"),
        (&["user", "show"], "<NAME>"),
        (&["user", "delete", "ana"], "--yes"),
        (&["user", "list", "--query", &long], "--query must have at most 254 characters"),
        (&["user", "reset-password", "ana", "--url", "example.com"], "--url must be like https://"),
        (&["user", "reset-password", "ana", "--url", "https://a.b/?c={code}"], "after the #"),
    ] {
        let run = Binary::new(arguments).env("DATABASE_URL", "postgresql://127.0.0.1:1/none");
        let (code, output) = run.output().await;
        assert_eq!(code, USAGE, "{arguments:?}: {output}");
        assert!(output.contains(part), "{arguments:?}: {part} is not in: {output}");
    }
}

#[tokio::test]
async fn each_command_has_an_example_and_its_exit_codes_in_its_help() {
    for command in COMMANDS {
        let (code, output) = Binary::new(&["user", command, "--help"]).output().await;
        assert_eq!(code, Some(0), "{output}");
        assert!(output.contains(&format!("Example: fast-zero user {command}")), "{output}");
        assert!(output.contains("3 no such user"), "{output}");
    }
}

#[tokio::test]
async fn settings_come_from_options_anywhere_from_variables_and_from_the_file() {
    let database = TestDatabase::create().await;
    let url = &*database.url();
    for arguments in [
        &["--database-url", url, "user", "list", "--json"][..],
        &["user", "--database-url", url, "--json", "list"],
        &["user", "--json", "--query", "list", "list", "--database-url", url],
        &["--database-url", url, "user", "--query=a", "list", "--json"],
    ] {
        let (code, stdout, stderr) = Binary::new(arguments).outputs().await;
        assert_eq!((code, usernames(&stdout)), (Some(0), Vec::new()), "{arguments:?}: {stderr}");
    }
    let file = format!("DATABASE_URL='{url}'\nLISTEN_ADDR=no address\n");
    let with_file = Binary::new(&["user", "list"]).file(".env", &file);
    // An empty variable is not set, and the settings of other subcommands are not read.
    let with_file = with_file.env("LOG_FORMAT", "").env("TRUSTED_PROXIES", "no network");
    let (code, output) = with_file.output().await;
    assert_eq!(code, Some(0), "{output}");

    let mistake = Binary::new(&["user", "list"]).env("DATABASE_URL", "mysql://app:hidden@db/app");
    let (code, output) = mistake.output().await;
    assert_eq!(code, CONFIG, "{output}");
    assert!(output.contains("DATABASE_URL") && !output.contains("hidden"), "{output}");
}

#[tokio::test]
async fn a_deletion_asks_on_a_terminal() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("a").await;
    for (answer, code) in [("n", Some(1)), ("", Some(1)), ("yes", Some(0))] {
        let terminal = openpty(None, None).expect("a terminal");
        let mut writer = File::from(terminal.master);
        writeln!(writer, "{answer}").expect("written");
        let run = user_command(&app.database, &["delete", "ana"]).input_from(terminal.slave);
        let (actual, _, stderr) = run.outputs().await;
        assert_eq!(actual, code, "{answer}: {stderr}");
        assert!(stderr.contains("Delete ana <ana@example.com> and 1 todo for good?"), "{stderr}");
        let users = app.fetch_scalar::<i64>("select count(*) from users").await;
        assert_eq!(users, i64::from(code != Some(0)));
    }
    app.create_user("ana").await;
    let deleted = json(&app.operate(&["delete", "ana", "--yes", "--json"]).await);
    assert_eq!((&deleted["username"], &deleted["deleted_todos"]), (&"ana".into(), &0.into()));
}

#[tokio::test]
async fn a_user_is_disabled_and_enabled_once() {
    let app = App::start().await;
    app.signed_up("ana").await;
    let first = json(&app.operate(&["disable", "ana", "--json"]).await);
    assert_eq!(first["ended_sessions"], 1);
    assert_eq!(first["revoked_personal_access_tokens"], 0);
    let second = json(&app.operate(&["disable", "ana", "--json"]).await);
    assert_eq!(first["disabled_time"], second["disabled_time"], "disabled since the first time");
    assert_eq!(second["ended_sessions"], 0);
    let refused = user_command(&app.database, &["reset-password", "ana"]).outputs().await;
    assert_eq!((refused.0, &*refused.1), (Some(1), ""));
    assert!(refused.2.contains("ana is disabled: run `fast-zero user enable ana`"), "{refused:?}");
    for was_disabled in [true, false] {
        let enabled = json(&app.operate(&["enable", "ana", "--json"]).await);
        assert_eq!(enabled["was_disabled"], was_disabled);
    }
    app.logged_in("ana").await;
}

#[tokio::test]
async fn a_code_is_alone_on_standard_output_or_in_the_fragment_of_a_url() {
    let app = App::start().await;
    let ana = app.create_user("ana").await;
    let run = user_command(&app.database, &["reset-password", "ana"]);
    let (_, stdout, stderr) = run.outputs().await;
    let code = stdout.strip_suffix('\n').expect("a line");
    assert!(code.starts_with("fzr_") && code.len() == 74, "{stdout}");
    assert!(stderr.contains("sets a new password for ana, once, until 20"), "{stderr}");

    let url = app.operate(&["reset-password", "ana", "--url", "https://example.com/reset"]).await;
    assert!(url.starts_with("https://example.com/reset#fzr_"), "{url}");
    let template = "https://example.com/#code={code}";
    let output = app.operate(&["reset-password", "ana", "--json", "--url", template]).await;
    let output = json(&output);
    let code = output["code"].as_str().expect("a code");
    assert_eq!(output["url"], format!("https://example.com/#code={code}"));
    assert_eq!(output["id"], ana.id.as_str());
    app.anonymous().reset_password(code, "a new password").await;
}

#[tokio::test]
async fn an_outdated_schema_is_not_touched() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let (code, output) = user_command(&database, &["list"]).output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("run `fast-zero migrate`"), "{output}");
}

#[tokio::test]
async fn audit_lines_name_the_user_by_id_and_no_line_has_a_code_or_a_password() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).env("RUST_LOG", "trace").start();
    let address = server.address().await.parse().expect("an address");
    let client = Client::new(connect(address).await);
    let id = client.create_user("ana").await.id;
    let mut log = String::new();
    let mut codes = Vec::new();
    for command in ["disable", "enable", "reset-password", "reset-password"] {
        let run = user_command(&database, &[command, "ana"]).env("RUST_LOG", "trace");
        let (code, stdout, stderr) = run.outputs().await;
        assert_eq!(code, Some(0), "{stderr}");
        log += &stderr;
        if command == "reset-password" {
            codes.push(stdout.trim_end().to_owned());
        }
        if command == "disable" {
            let rejected = client.try_log_in("ana", PASSWORD).await;
            assert_status(rejected, tonic::Code::PermissionDenied, "USER_DISABLED");
        }
    }
    let new = "a password of my own";
    let wrong = client.try_reset_password(&codes[0], new).await;
    assert_unauthenticated(wrong, "RESET_CODE_INVALID");
    client.reset_password(&codes[1], new).await;
    let (code, _, stderr) = user_command(&database, &["delete", "ana", "--yes"]).outputs().await;
    assert_eq!(code, Some(0), "{stderr}");
    log += &stderr;

    server.wait_for_line("\"password_reset\"").await;
    log += &server.output();
    for event in [
        "user_disabled",
        "login_disabled",
        "user_enabled",
        "password_reset_created",
        "password_reset_failed",
        "password_reset",
        "user_deleted",
    ] {
        let text = format!("\"event\":\"{event}\"");
        let line = log.lines().find(|line| line.contains(&text));
        let line = line.unwrap_or_else(|| panic!("no {event} in:\n{log}"));
        assert!(line.contains(&id) && !line.contains("ana"), "{line}");
        assert!(OBSERVABILITY.contains(&format!("| `{event}` |")), "{event} is not documented");
    }
    for code in &codes {
        // A part of the text, too, in which the secret is.
        assert!(!log.contains(code) && !log.contains(&code[30..60]), "a code is in the log");
    }
    assert!(!log.contains(new), "the password is in the log");
}

/// Returns the names of all fields of a JSON document.
fn fields(document: &Value) -> Vec<String> {
    match document {
        Value::Object(object) => {
            let below = object.values().flat_map(fields);
            object.keys().cloned().chain(below).collect()
        }
        Value::Array(values) => values.iter().flat_map(fields).collect(),
        _ => Vec::new(),
    }
}

#[tokio::test]
async fn the_commands_of_the_operators_page_print_what_it_shows() {
    let app = App::start().await;
    app.signed_up("ana").await;
    let mut stdout = String::new();
    let (mut commands, mut documents) = (0, 0);
    for block in OPERATIONS.split("```").skip(1).step_by(2) {
        let (language, text) = block.split_once('\n').expect("a language");
        if language == "json" {
            assert_eq!(fields(&json(text)), fields(&json(&stdout)), "{text}");
            documents += 1;
        }
        for command in text.lines().map(str::trim).filter(|it| language == "sh" && !it.is_empty()) {
            let arguments = command.strip_prefix("fast-zero ").unwrap_or_default();
            let run = Binary::in_bash(arguments).env("DATABASE_URL", &app.database.url());
            let (code, output, errors) = run.outputs().await;
            assert_eq!(code, Some(0), "{command}: {errors}");
            stdout = output;
            commands += 1;
        }
    }
    assert_eq!((commands, documents), (9, 6));
}

#[cfg(feature = "embedded")]
#[test]
fn the_embedded_database_is_used_if_none_is_configured() {
    use std::io::Read;

    use crate::support::embedded::{fast_zero, temp_dir};

    let temp_dir = temp_dir();
    let data_dir = temp_dir.path().join("data");
    for (arguments, expected) in
        [(&["migrate"][..], ""), (&["user", "list", "--json"], "{\"users\":[\n]}\n")]
    {
        let mut child = fast_zero(arguments, &data_dir).spawn().expect("the binary starts");
        let mut stdout = String::new();
        let mut pipe = child.stdout.take().expect("piped");
        pipe.read_to_string(&mut stdout).expect("text");
        assert!(child.wait().expect("a child").success());
        assert_eq!(stdout, expected);
    }
}
