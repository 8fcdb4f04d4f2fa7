//! The examples work as `examples/README.md` documents them.

mod follow;
mod verify;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use fast_zero::proto::{
    auth::v1::{LogoutScope, TokenSet},
    todo::v1::ListTodosRequest,
};
use tempfile::TempDir;
use tokio::process::Command;

use crate::support::{
    App,
    assert::assert_unauthenticated,
    postgres::print_line,
    tokens::{Jwt, TokenKey, seconds_from_now},
};

const README: &str = include_str!("../../../examples/README.md");

/// The program in the README of the repository, and what it prints.
const PROGRAM: &str = include_str!("../../../README.md");

/// Failed logins after which the server rejects all logins from an IP address.
const MAX_FAILURES: usize = 100;

/// What each program prints after it has logged in.
const TODOS: [&str; 4] = [
    "todo: Buy milk",
    "todo: Water the plants",
    "stale etag: ETAG_MISMATCH",
    "invalid field: todo.title: must have 1 to 200 characters",
];

/// An example that is ready to run.
struct Example {
    command: String,
    /// Runs the program that follows changes, if there is one.
    follow_command: Option<String>,
    /// Verifies access tokens.
    verify_command: String,
    dir: PathBuf,
}

/// The shell blocks of a section of the README.
fn shell_blocks(section: &str) -> Vec<&'static str> {
    let (_, rest) = README.split_once(&format!("\n## {section}\n")).expect("the section exists");
    let section = rest.split("\n## ").next().unwrap_or(rest);
    section.split("```sh\n").skip(1).filter_map(|block| block.split("\n```").next()).collect()
}

/// Prepares a command as at a terminal, but it ends at the first failure and lets the other tests
/// run first.
fn shell_command(script: &str, dir: &Path, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "19", "bash", "-euo", "pipefail", "-c", script]).current_dir(dir);
    for variable in [
        "FASTZERO_ACCESS_TOKEN",
        "FASTZERO_ADDR",
        "FASTZERO_COPY",
        "FASTZERO_JWKS_URL",
        "FASTZERO_REFRESH_TOKEN",
    ] {
        command.env_remove(variable);
    }
    command.envs(variables.iter().copied()).kill_on_drop(true);
    command
}

/// Runs a command to its end.
async fn shell(script: &str, dir: &Path, variables: &[(&str, &str)]) -> Output {
    shell_command(script, dir, variables).output().await.expect("nice is installed")
}

/// Runs a command that checks for a tool. Prints a line if it fails.
async fn has_tool(name: &str, check: &str) -> bool {
    let dir = TempDir::new().expect("a directory");
    let found = shell(check, dir.path(), &[]).await.status.success();
    if !found {
        print_line(&format!("SKIPPED: an example: `{check}` fails, so {name} is not usable"));
    }
    found
}

/// The variables of a session to resume.
fn session<'a>(access_token: &'a str, refresh_token: &'a str) -> [(&'static str, &'a str); 2] {
    [("FASTZERO_ACCESS_TOKEN", access_token), ("FASTZERO_REFRESH_TOKEN", refresh_token)]
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Copies a directory, without what the commands of the README generate.
fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("created");
    for entry in fs::read_dir(from).expect("a directory") {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).expect("an entry");
        if path.is_file() {
            fs::copy(&path, to.join(name)).expect("copied");
        } else if name != "gen" && name != ".venv" {
            copy_dir(&path, &to.join(name));
        }
    }
}

impl Example {
    /// Returns the example with the commands of these blocks: run the program, follow changes, and
    /// verify a token.
    fn new(blocks: &[&str], dir: PathBuf) -> Self {
        let (command, follow_command, verify_command) = match blocks {
            [command, verify] => (command, None, verify),
            [command, follow, verify] => (command, Some((*follow).to_owned()), verify),
            _ => panic!("the section has a block for each program"),
        };
        let (command, verify_command) = ((*command).to_owned(), (*verify_command).to_owned());
        Self { command, follow_command, verify_command, dir }
    }

    /// Runs the first block of the section, in a copy of the sources. The others run the programs.
    async fn set_up(section: &str, dir: &str, sources: &TempDir) -> Self {
        let blocks = shell_blocks(section);
        let (set_up, programs) = blocks.split_first().expect("the section has blocks");
        let (root, copy) = (Path::new(env!("CARGO_MANIFEST_DIR")), sources.path());
        for part in ["proto", dir] {
            copy_dir(&root.join(part), &copy.join(part));
        }
        fs::copy(root.join("buf.yaml"), copy.join("buf.yaml")).expect("copied");
        let done = shell(set_up, copy, &[]).await;
        assert!(done.status.success(), "{}{}", text(&done.stdout), text(&done.stderr));
        Self::new(programs, copy.join(dir))
    }

    async fn run(&self, app: &App, variables: &[(&str, &str)]) -> Output {
        let address = app.address.to_string();
        let variables = [&[("FASTZERO_ADDR", &*address)], variables].concat();
        shell(&self.command, &self.dir, &variables).await
    }

    /// Runs the program, which succeeds. Returns what it prints.
    async fn succeed(&self, app: &App, variables: &[(&str, &str)]) -> String {
        let output = self.run(app, variables).await;
        let (printed, errors) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{printed}{errors}");
        for line in TODOS {
            assert!(printed.lines().any(|printed| printed == line), "no {line:?} in:\n{printed}");
        }
        printed
    }

    /// Runs the program, which fails and prints nothing else than an error with these texts.
    async fn fail(&self, app: &App, variables: &[(&str, &str)], texts: &[&str]) {
        let output = self.run(app, variables).await;
        assert_eq!(output.status.code(), Some(1));
        let (printed, errors) = (text(&output.stdout), text(&output.stderr));
        assert!(!printed.contains("refreshed"), "{printed}{errors}");
        for text in texts {
            assert!(errors.contains(text), "no {text:?} in:\n{errors}");
        }
    }

    async fn assert_works(&self) {
        let app = App::start().await;
        let first = self.succeed(&app, &[]).await;
        assert!(first.starts_with("signed up: ana\n"), "{first}");
        let second = self.succeed(&app, &[]).await;
        assert!(second.starts_with("already signed up: USERNAME_EXISTS\n"), "{second}");
        assert!(![first, second].concat().contains("refreshed"));
        self.assert_refreshes(&app).await;
        self.assert_prints_retry_delay(&app).await;
    }

    async fn assert_refreshes(&self, app: &App) {
        let (bob, eve) = (app.signed_up("bob").await, app.signed_up("eve").await);
        let expired = Jwt::for_client(&bob).claim("exp", seconds_from_now(-60)).signed();
        // The server returns TOKEN_INVALID.
        let retired = Jwt::for_client(&eve).with_key(TokenKey::of_month(-2)).signed();
        for (client, rejected) in [(&bob, &expired), (&eve, &retired)] {
            let tokens = session(rejected, &client.tokens().refresh_token);
            let resumed = self.succeed(app, &tokens).await;
            // Its two concurrent calls both fail and use one refresh.
            assert_eq!(resumed.matches("refreshed the access token\n").count(), 1, "{resumed}");
            assert!(!resumed.contains("signed up"), "{resumed}");
            let todos = client.list_all_todos(ListTodosRequest::default()).await;
            assert_eq!(todos.len(), 2);
        }

        // Errors of the refresh reach the caller, and so do those that a refresh does not cure.
        self.fail(app, &session(&retired, "none"), &["(REFRESH_TOKEN_INVALID)"]).await;
        bob.log_out(LogoutScope::ThisSession).await;
        let TokenSet { access_token, refresh_token, .. } = bob.tokens();
        self.fail(app, &session(access_token, refresh_token), &["(SESSION_REVOKED)"]).await;
    }

    /// Runs the program in the README with the packages of the example.
    async fn assert_program_of_readme_works(&self) {
        let (_, program) = PROGRAM.split_once("```python\n").expect("a program");
        let (program, after) = program.split_once("\n```\n").expect("its end");
        let (_, prints) = after.split_once("This prints `").expect("what it prints");
        let (prints, _) = prints.split_once('`').expect("its end");
        let app = App::start().await;
        app.signed_up("ana").await;
        let program = program.replace("localhost:50051", &app.address.to_string());
        fs::write(self.dir.join("program.py"), program).expect("written");
        let run = "PYTHONPATH=gen .venv/bin/python program.py";
        let output = shell(run, &self.dir, &[]).await;
        assert_eq!(text(&output.stdout).trim_end(), prints, "{}", text(&output.stderr));
    }

    async fn assert_prints_retry_delay(&self, app: &App) {
        for number in 0..MAX_FAILURES {
            let failed = app.anonymous().try_log_in(&format!("user{number}"), "a guess").await;
            assert_unauthenticated(failed, "INCORRECT_CREDENTIALS");
        }
        self.fail(app, &[], &["(TOO_MANY_ATTEMPTS)", "\nretry after "]).await;
    }
}

#[tokio::test]
#[ignore = "downloads packages: cargo test --locked --test it examples:: -- --ignored"]
async fn the_python_example_works_as_documented() {
    if !has_tool("Python", "python3 -m ensurepip --version").await
        || !has_tool("the package index", "python3 -m pip download --quiet --no-deps grpcio").await
    {
        return;
    }
    let sources = TempDir::new().expect("a directory");
    let example = Example::set_up("Python", "examples/python", &sources).await;
    example.assert_works().await;
    example.assert_program_of_readme_works().await;
    example.assert_follows().await;
    example.assert_verifies().await;
}

#[tokio::test]
#[ignore = "downloads and compiles modules: cargo test --locked --test it examples:: -- --ignored"]
async fn the_go_example_works_as_documented() {
    if !has_tool("buf", "buf --version").await
        || !has_tool("Go", "go list -m google.golang.org/protobuf@latest").await
    {
        return;
    }
    let sources = TempDir::new().expect("a directory");
    let example = Example::set_up("Go", "examples/go", &sources).await;
    example.assert_works().await;
    example.assert_verifies().await;
}

#[tokio::test]
#[ignore = "compiles a program: cargo test --locked --test it examples:: -- --ignored"]
async fn the_rust_example_works_as_documented() {
    // In the repository, whose target directory has the dependencies.
    let example = Example::new(&shell_blocks("Rust"), env!("CARGO_MANIFEST_DIR").into());
    example.assert_works().await;
    example.assert_follows().await;
    example.assert_verifies().await;
}
