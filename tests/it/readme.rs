//! The commands of the README and of `docs/api.md` work as pasted.

use std::process::Stdio;

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use crate::support::{
    App,
    postgres::print_line,
    readme::{API, CONFIGURATION, DEPLOYMENT, OBSERVABILITY, README, TLS, commands, has_grpcurl},
    wait::with_timeout,
};

/// The picture of the tour, which `docs/tour.py` draws.
const TOUR_SVG: &str = include_str!("../../docs/tour.svg");

#[tokio::test]
async fn the_tour_works_as_pasted() {
    if !has_grpcurl().await {
        return;
    }
    let app = App::start().await;
    let address = app.address.to_string();
    let tour = [
        commands(README, "A tour"),
        commands(README, "A service's own credential"),
        commands(API, "More calls"),
    ]
    .join("\n");
    let tour = tour.replace("localhost:50051", &address);
    // As at a terminal, but the first failed command ends the shell.
    let shell = Command::new("bash").args(["-euo", "pipefail", "-c", &tour]).output().await;
    let shell = shell.expect("an installed bash");
    let (output, errors) =
        (String::from_utf8_lossy(&shell.stdout), String::from_utf8_lossy(&shell.stderr));
    assert!(shell.status.success(), "{output}\n{errors}");
    for shown in [
        "\"username\": \"ana\"",
        "\"title\": \"Read lib.rs\"",
        "\"title\": \"Buy milk\"",
        "\"name\": \"nightly job\"",
        "\"state\": \"TODO_STATE_DONE\"",
        "\"userAgent\": \"grpcurl",
        "\"status\": \"SERVING\"",
        "grpc.reflection.v1.ServerReflection",
        "rpc ListTodos",
        "repeated .fastzero.todo.v1.TodoState states",
    ] {
        assert!(output.contains(shown), "{shown} is not in:\n{output}");
    }
}

/// A terminal, into which a test pastes commands. The first failed command ends it.
struct Terminal {
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    shell: Child,
}

impl Terminal {
    fn open() -> Self {
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-s"]).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = command.spawn().expect("an installed bash");
        let input = shell.stdin.take().expect("piped");
        let output = BufReader::new(shell.stdout.take().expect("piped")).lines();
        Self { input, output, shell }
    }

    async fn paste(&mut self, commands: &str) {
        self.input.write_all(format!("{commands}\n").as_bytes()).await.expect("a running shell");
    }

    /// Waits for the next JSON object that grpcurl prints, as a message.
    async fn next_message(&mut self) -> Value {
        let mut message = String::new();
        loop {
            let line = with_timeout("a line of the terminal", self.output.next_line()).await;
            let line = line.expect("UTF-8").expect("a running shell");
            message.push_str(&line);
            if line == "}" {
                return serde_json::from_str(&message).expect("JSON");
            }
        }
    }
}

/// Closes the terminal, which ends all that runs in it.
impl Drop for Terminal {
    fn drop(&mut self) {
        let pid = self.shell.id().and_then(|id| i32::try_from(id).ok());
        if let Some(pid) = pid {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Returns the only block of this language in a section of the README.
fn block_of(section: &str, language: &str) -> &'static str {
    let (_, rest) = README.split_once(&format!("\n## {section}\n")).expect("the section exists");
    let section = rest.split("\n## ").next().unwrap_or(rest);
    let blocks: Vec<_> = section.split(&format!("```{language}\n")).skip(1).collect();
    assert_eq!(blocks.len(), 1, "{language} in {section}");
    blocks[0].split("\n```").next().expect("not empty")
}

/// Returns the value without what differs between two runs: the texts of IDs, times and versions.
fn shape(value: &Value) -> Value {
    let is_fixed = |key: &str| ["title", "state"].contains(&key);
    match value {
        Value::Object(fields) => {
            let shape_of = |(key, value): (&String, &Value)| {
                let value = if is_fixed(key) { value.clone() } else { shape(value) };
                (key.clone(), value)
            };
            Value::Object(fields.iter().map(shape_of).collect())
        }
        Value::Array(values) => Value::Array(values.iter().map(shape).collect()),
        Value::String(_) => Value::String("text".to_owned()),
        other => other.clone(),
    }
}

/// The block of the watch is not among the shell blocks, because it does not end.
#[tokio::test]
async fn a_watch_in_another_terminal_shows_what_the_tour_does() {
    if !has_grpcurl().await {
        return;
    }
    let app = App::start().await;
    let here = |commands: &str| commands.replace("localhost:50051", &app.address.to_string());
    let tour = here(&commands(README, "A tour"));
    let create = one_line_commands(&tour).into_iter().find(|it| it.contains("/CreateTodo"));
    let create = create.expect("the tour creates a todo");
    let (mut first, mut second) = (Terminal::open(), Terminal::open());
    first.paste(&tour).await;
    // CreateUser, CreateTodo and ListTodos; the output of Login is captured.
    for _ in 0..3 {
        first.next_message().await;
    }
    second.paste(&here(block_of("A tour", "bash"))).await;
    let full_sync = second.next_message().await;
    assert_eq!(full_sync["full"], Value::Bool(true), "{full_sync}");
    let documented = serde_json::from_str(block_of("A tour", "json")).expect("JSON");
    assert_eq!(shape(&full_sync["changes"]), shape(&documented)["changes"]);
    first.paste(&create).await;
    let created = first.next_message().await;
    let message = second.next_message().await;
    assert_eq!(shape(&message), shape(&documented));
    assert_eq!(message["changes"][0]["todo"], created["todo"]);
}

/// Returns the commands of a shell script, each in one line.
fn one_line_commands(script: &str) -> Vec<String> {
    let mut commands = vec![String::new()];
    for line in script.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (start, continues) = match line.strip_suffix(" \\") {
            Some(start) => (start, true),
            None => (line, line.ends_with('|')),
        };
        let command = commands.last_mut().expect("at least one");
        command.push_str(start.trim_start());
        if continues {
            command.push(' ');
        } else {
            commands.push(String::new());
        }
    }
    commands.pop();
    commands
}

#[test]
fn the_containers_of_the_readme_are_those_of_the_deployment_guide() {
    let commands_of_readme = commands(README, "Quick start");
    let containers: Vec<_> =
        commands_of_readme.lines().skip_while(|it| *it != "cp .env.example .env").collect();
    assert_eq!(containers.len(), 3, "{commands_of_readme}");
    let deployment = commands(DEPLOYMENT, "Containers");
    for command in containers {
        assert!(deployment.lines().any(|line| line == command), "{command}");
    }
}

#[test]
fn the_picture_of_the_tour_shows_its_commands() {
    let attributes = TOUR_SVG.split("data-command=\"").skip(1);
    let pictured = attributes.filter_map(|rest| rest.split('"').next()).map(|command| {
        let entities =
            [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#x27;", "'"), ("&amp;", "&")];
        entities.iter().fold(command.to_owned(), |text, (entity, char)| text.replace(entity, char))
    });
    let tour = one_line_commands(&commands(README, "A tour"));
    assert_eq!(tour.len(), 4, "{tour:?}");
    assert_eq!(pictured.collect::<Vec<_>>(), tour, "run docs/tour.py");
}

#[tokio::test]
async fn grpcurl_shows_the_details_of_errors() {
    let app = App::start().await;
    let rejected = Command::new("grpcurl")
        .args(["-plaintext", "-d", "{}", &app.address.to_string()])
        .arg("fastzero.user.v1.UserService/CreateUser")
        .output();
    let Ok(rejected) = rejected.await else {
        print_line("SKIPPED: the details of errors: grpcurl is not on the PATH");
        return;
    };
    let errors = String::from_utf8_lossy(&rejected.stderr);
    for shown in ["\"reason\": \"INVALID_REQUEST\"", "\"field\": \"username\"", "\"requestId\""] {
        assert!(errors.contains(shown), "{shown} is not in:\n{errors}");
    }
}

#[test]
fn commands_that_replace_data_or_versions_stop_at_the_first_failure() {
    let blocks: Vec<_> =
        DEPLOYMENT.split("```").skip(1).step_by(2).filter(|it| it.lines().count() > 3).collect();
    for (command, line) in [
        ("pg_dump", "set -eu"),
        ("pg_dump", "umask 077"),
        ("pg_restore", "set -eu"),
        ("kubectl apply", "set -eu"),
    ] {
        let with_command = blocks.iter().filter(|block| block.contains(command));
        let count = with_command.clone().count();
        assert!(count > 0, "{command} is documented");
        for block in with_command {
            assert!(block.lines().any(|it| it.trim() == line), "no {line} in:{block}");
        }
    }
}

#[test]
fn git_ignores_what_the_commands_of_the_documentation_write() {
    let ignored = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/.gitignore"));
    let is_ignored = |file: &str| ignored.lines().any(|line| line.strip_prefix('/') == Some(file));
    // Code that is generated from `proto/`, as "Calls from a service" demands.
    let mut written = vec!["fastzero/", "gen/"];
    for document in [README, API, CONFIGURATION, DEPLOYMENT, OBSERVABILITY, TLS] {
        for block in document.split("```sh\n").skip(1) {
            let words: Vec<_> =
                block.split("\n```").next().unwrap_or_default().split_whitespace().collect();
            let outputs =
                words.windows(2).filter(|pair| ["-keyout", "-out", ">", ">>"].contains(&pair[0]));
            written.extend(outputs.map(|pair| pair[1]));
            let redirected = words.iter().filter_map(|word| word.strip_prefix('>'));
            let is_file = |file: &&str| file.starts_with(|c: char| c.is_ascii_alphabetic());
            written.extend(redirected.filter(is_file));
            written.extend(words.windows(3).filter(|it| it[0] == "mv").map(|it| it[2]));
        }
    }
    for file in ["key.pem", "cert.pem", ".env", "backup.dump"] {
        assert!(written.contains(&file), "{file} is written");
    }
    for file in written {
        assert!(is_ignored(file), "{file} is not in .gitignore");
    }
}
