//! The commands of `docs/deployment.md`, and of the tour.

use fast_zero::proto::todo::v1::ListTodosRequest;
use tonic::Code;

use super::{APP, BASE, UPGRADES, login};
use crate::support::{
    assert::assert_status,
    compose::{
        Stack, docker_command, expect_success, free_port, inspect, is_engine_available, run_command,
    },
    readme::{API, DEPLOYMENT, README, commands, has_grpcurl, subsection_blocks},
    todos::titles,
};

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_commands_of_the_documentation_work_as_pasted() {
    if !is_engine_available() || !has_grpcurl().await {
        return;
    }
    let stack = Stack::without_env_file(&[BASE]);
    let alone = format!("{}-alone", stack.project);
    let containers = commands(DEPLOYMENT, "Containers");
    let (backup, upgrade) =
        (subsection_blocks(DEPLOYMENT, "Backups"), subsection_blocks(DEPLOYMENT, UPGRADES));
    let (before, _) = containers.split_once(backup[0]).expect("a backup");
    let tour = [
        commands(README, "A tour"),
        commands(README, "A service's own credential"),
        commands(API, "More calls"),
    ]
    .join("\n");
    let commands = [
        &[before, &tour, backup[0], AFTER_THE_BACKUP, backup[1]][..],
        &[upgrade[0], NEW_VOLUME, upgrade[1], upgrade[2]],
    ]
    .concat()
    .join("\n")
    .replace("cargo run", env!("CARGO_BIN_EXE_fast-zero"))
    .replace("localhost:50051", &format!("localhost:{}", stack.port))
    .replace("localhost:5432", &format!("localhost:{}", stack.database_port))
    .replace("50052", &free_port().to_string())
    .replace("fast-zero-alone", &alone)
    .replace("fast-zero_", &format!("{}_", stack.project));
    let mut shell = stack.command("bash");
    // As at a terminal, but the first failed command ends the shell.
    shell.args(["-euo", "pipefail", "-c", &commands]);
    shell.env("GIT_DIR", concat!(env!("CARGO_MANIFEST_DIR"), "/.git"));
    let done = run_command(shell).await;
    let _ = run_command(docker_command(&["rm", "--force", &alone])).await;
    let output = expect_success(done);
    for shown in ["status: SERVING", "\"status\": \"SERVING\"", "(healthy)", "TODO_STATE_DONE"] {
        assert!(output.contains(shown), "{shown} is not in:\n{output}");
    }
    // The last start, in a shell of its own, has the commit of the first build.
    stack.compose(&["up", "--build", "--wait"]).await;
    let label = "{{index .Config.Labels \"org.opencontainers.image.revision\"}}";
    let built = inspect(&stack.container(APP).await, label).await;
    let env = std::fs::read_to_string(stack.path(".env")).expect("the file exists");
    let commit = env.lines().find_map(|line| line.strip_prefix("FASTZERO_COMMIT="));
    assert_eq!(commit, Some(&*built));
    assert_eq!(built.len(), 12, "{built}");
    let anonymous = stack.anonymous().await;
    let ana = anonymous.logged_in("ana", "correct horse").await.expect("ana was restored");
    let todos = ana.list_todos(ListTodosRequest::default()).await.todos;
    assert_eq!(titles(&todos), ["Read lib.rs", "Buy milk"]);
    let rejected = anonymous.auth().login(login("bob")).await;
    assert_status(rejected, Code::Unauthenticated, "INCORRECT_CREDENTIALS");
}

/// A call after the backup, whose write a restored database does not contain.
const AFTER_THE_BACKUP: &str = r#"grpcurl -plaintext \
    -d '{"username": "bob", "email": "bob@example.com", "password": "correct horse battery"}' \
    localhost:50051 fastzero.user.v1.UserService/CreateUser
"#;

/// The change of `compose.yaml` for a new major version, without another image.
const NEW_VOLUME: &str = "sed -i 's/pgdata/pgdata19/' compose.yaml";
