//! The containers: the image, the stack that compose starts, and the one with replicas.
//!
//! They need a Docker engine and build the image, so they run only when asked for:
//! `cargo test compose:: -- --ignored`.

use std::time::{Duration, Instant};

use fast_zero::{
    database::MIGRATIONS,
    proto::{auth::v1::LoginRequest, todo::v1::ListTodosRequest},
};
use tokio::time::sleep;
use tonic::{Code, Status};

use crate::{
    readme::{commands, has_grpcurl},
    support::{
        Client, PASSWORD,
        app::SECRET_KEY,
        assert::assert_refused,
        compose::{
            DATABASE_PASSWORD, Stack, docker, docker_command, engine_answers, finish, free_port,
            inspect, succeeded, text,
        },
        lock::RowLock,
        parallel::at_once,
        todos::{titled, titles, without_message},
        wait::eventually,
    },
};

const BASE: &str = "compose.yaml";
const REPLICAS: &str = "deploy/compose.replicas.yaml";
const SECRETS: &str = "deploy/compose.secrets.yaml";
const TESTS: &str = "deploy/compose.tests.yaml";

const APP: &str = "fastzero_app";
const DATABASE: &str = "fastzero_database";

/// The longest time until an outage is seen from outside.
const OUTAGE_SEEN_AFTER: Duration = Duration::from_secs(15);

/// The longest time that a call takes: its deadline of 5 s, and the way there.
const ANSWERED_AFTER: Duration = Duration::from_millis(5_500);

/// The longest time that a stop takes: the grace of 8 s, and 2 s more.
const STOPPED_AFTER: Duration = Duration::from_secs(10);

/// What the image may add to its base, in bytes.
const IMAGE_SIZE: u64 = 30_000_000;

/// What the service may use when it has nothing to do, in MiB.
const IDLE_MEMORY: f64 = 32.0;

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_outage_of_the_database_is_told_and_survived() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::started(&[BASE]).await;
    let container = stack.container(APP).await;
    assert_eq!(inspect(&container, "{{.State.Health.Status}}").await, "healthy");
    let probe = "/bin/grpc_health_probe";
    assert!(inspect(&container, "{{.Config.Healthcheck.Test}}").await.contains(probe));
    docker(&["exec", &container, probe, "-addr=127.0.0.1:50051"]).await;
    docker(&["exec", &container, "/bin/fast-zero", "healthcheck"]).await;

    let ana = stack.anonymous().await.signed_up("ana").await;
    let todo = ana.create_todo("Stay").await;
    let begun = Instant::now();
    stack.compose(&["kill", DATABASE]).await;
    let refused = [
        timed(ana.try_get_todo(&todo.id)).await.map(without_message),
        timed(ana.try_list_todos(ListTodosRequest::default())).await.map(without_message),
        timed(ana.try_create_todo(Some(titled("Lost")))).await.map(without_message),
        timed(ana.auth().login(login("ana"))).await.map(without_message),
    ];
    for refused in refused {
        assert_refused(refused, Code::Unavailable, "DATABASE_UNAVAILABLE");
    }
    stack.until_health(APP, "unhealthy").await;
    assert!(begun.elapsed() < OUTAGE_SEEN_AFTER, "{:?}", begun.elapsed());

    stack.compose(&["start", DATABASE]).await;
    stack.until_health(APP, "healthy").await;
    assert_eq!(ana.get_todo(&todo.id).await, todo);
    assert_eq!(inspect(&container, "{{.RestartCount}}").await, "0");

    let usage = docker(&["stats", "--no-stream", "--format", "{{.MemUsage}}", &container]).await;
    let used = usage.split("MiB").next().and_then(|used| used.parse::<f64>().ok());
    assert!(used.is_some_and(|used| used < IDLE_MEMORY), "{usage}");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_commands_of_the_readme_work_as_pasted() {
    if !engine_answers() || !has_grpcurl().await {
        return;
    }
    let stack = Stack::bare(&[BASE]);
    let alone = format!("{}-alone", stack.project);
    let containers = commands("In containers");
    // The tour comes where it is spoken of; what comes after the backup is not in it.
    let (before, after) = containers.split_once(BACKUP).expect("there is a backup");
    let (backup, after) = after.split_once('\n').expect("there is more");
    let commands =
        [before, &commands("A tour"), "\n", BACKUP, backup, "\n", AFTER_THE_BACKUP, after];
    let commands = commands
        .concat()
        .replace("docker compose down\n", NEW_VOLUME)
        .replace("cargo run", env!("CARGO_BIN_EXE_fast-zero"))
        .replace("localhost:50051", &format!("localhost:{}", stack.port))
        .replace("localhost:5432", &format!("localhost:{}", stack.database_port))
        .replace("50052", &free_port().to_string())
        .replace("fast-zero-alone", &alone)
        .replace("fast-zero_", &format!("{}_", stack.project));
    let mut shell = stack.command("bash");
    // As at a terminal, but ending at the first command that fails.
    shell.args(["-euo", "pipefail", "-c", &commands]);
    shell.env("GIT_DIR", concat!(env!("CARGO_MANIFEST_DIR"), "/.git"));
    let done = finish(shell).await;
    let _ = finish(docker_command(&["rm", "--force", &alone])).await;
    let output = succeeded(done);
    for shown in ["status: SERVING", "\"status\": \"SERVING\"", "(healthy)", "TODO_STATE_DONE"] {
        assert!(output.contains(shown), "{shown} is not in:\n{output}");
    }
    let anonymous = stack.anonymous().await;
    let ana = anonymous.logged_in("ana", "correct horse").await.expect("ana was restored");
    let todos = ana.list_todos(ListTodosRequest::default()).await.todos;
    assert_eq!(titles(&todos), ["Read lib.rs"]);
    let refused = anonymous.auth().login(login("bob")).await;
    assert_refused(refused, Code::Unauthenticated, "INCORRECT_CREDENTIALS");
}

/// How the backup of the README begins.
const BACKUP: &str = "docker compose exec -T fastzero_database sh -c 'pg_dump";

/// What a restored database does not have.
const AFTER_THE_BACKUP: &str = r#"grpcurl -plaintext \
    -d '{"username": "bob", "email": "bob@example.com", "password": "correct horse battery"}' \
    localhost:50051 fastzero.user.v1.UserService/CreateUser
"#;

/// What the README tells to do before a new major version starts.
const NEW_VOLUME: &str = "docker compose down\nsed -i 's/pgdata/pgdata19/' compose.yaml\n";

/// Every answer comes in time, whatever it is.
async fn timed<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let begun = Instant::now();
    let answer = call.await;
    assert!(begun.elapsed() < ANSWERED_AFTER, "{:?}", begun.elapsed());
    answer
}

fn login(login: &str) -> LoginRequest {
    LoginRequest { login: login.to_owned(), password: PASSWORD.to_owned() }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_stop_lets_calls_finish() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::started(&[BASE]).await;
    let ana = stack.anonymous().await.signed_up("ana").await;
    let todo = ana.create_todo("Wait").await;
    let mut lock = RowLock::hold(stack.sql().await, "lock todos").await;
    let deleting = tokio::spawn({
        let (ana, id) = (ana.clone(), todo.id.clone());
        async move { ana.try_delete_todo(&id, "").await }
    });
    lock.until_awaited().await;

    let container = stack.container(APP).await;
    let begun = Instant::now();
    let stopping = tokio::spawn({
        let container = container.clone();
        async move { docker(&["stop", &container]).await }
    });
    eventually("the server stops", async || docker_logs(&container).await.contains("\"stopping\""))
        .await;
    lock.release().await;
    deleting.await.expect("no panic").expect("a call under way is answered");
    stopping.await.expect("no panic");
    assert!(begun.elapsed() < STOPPED_AFTER, "{:?}", begun.elapsed());
    assert_eq!(inspect(&container, "{{.State.ExitCode}}").await, "0");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_data_live_as_long_as_their_volume() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::started(&[BASE]).await;
    stack.anonymous().await.create_user("ana").await;
    stack.compose(&["down"]).await;
    stack.compose(&["up", "--wait"]).await;
    stack.anonymous().await.logged_in("ana", PASSWORD).await.expect("ana is still there");
    stack.compose(&["down", "--volumes"]).await;
    stack.compose(&["up", "--wait"]).await;
    let refused = stack.anonymous().await.auth().login(login("ana")).await;
    assert_refused(refused, Code::Unauthenticated, "INCORRECT_CREDENTIALS");
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn compose_names_what_is_missing() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::bare(&[BASE]);
    let refused = stack.try_compose(&["config", "--quiet"]).await;
    assert!(!refused.status.success());
    assert!(text(&refused).contains(".env.example"), "{}", text(&refused));

    std::fs::copy(stack.path(".env.example"), stack.path(".env")).expect("copied");
    let refused = stack.try_compose(&["config", "--quiet"]).await;
    assert!(!refused.status.success());
    assert!(text(&refused).contains("variable SECRET_KEY is missing"), "{}", text(&refused));

    for files in [&[BASE][..], &[BASE, REPLICAS], &[BASE, SECRETS], &[TESTS]] {
        let stack = Stack::configured(files);
        let checked = stack.try_compose(&["config", "--quiet"]).await;
        assert!(checked.status.success(), "{files:?}");
        assert_eq!(text(&checked), "", "{files:?}");
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_bad_setting_ends_the_start_with_a_readable_line() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    stack.compose(&["build"]).await;
    stack.compose(&["up", "--wait", DATABASE]).await;
    for (setting, code, line) in [
        ("SECRET_KEY=short", 78, "error: SECRET_KEY is too short"),
        ("SECRET_KEY=", 78, "error: SECRET_KEY must be set"),
        ("DATABASE_URL=", 78, "error: DATABASE_URL must be set"),
        ("DATABASE_URL=mysql://db", 78, "error: DATABASE_URL must be like postgresql://"),
        ("DATABASE_URL=postgresql://nowhere/db", 1, "error: "),
        ("PGPASSWORD=wrong", 1, "password authentication failed"),
    ] {
        let wait = "DATABASE_WAIT_SECONDS=1";
        let run = ["run", "--rm", "--no-deps", "-e", wait, "-e", setting, APP];
        let refused = stack.try_compose(&run).await;
        let said = text(&refused);
        assert_eq!(refused.status.code(), Some(code), "{setting}: {said}");
        assert!(said.contains(line), "{setting}: {said}");
        assert!(!said.contains("panicked"), "{setting}: {said}");
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn replicas_that_start_at_once_migrate_once() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    stack.compose(&["build"]).await;
    stack.compose(&["up", "--wait", DATABASE]).await;
    let run = ["run", "--detach", "--no-deps", APP];
    let (one, other) = tokio::join!(stack.compose(&run), stack.compose(&run));
    for replica in [one.trim(), other.trim()] {
        eventually("it serves", async || {
            assert_eq!(inspect(replica, "{{.State.Running}}").await, "true");
            docker_logs(replica).await.contains("\"serving\"")
        })
        .await;
    }
    let applied = sqlx::query_scalar("select count(*) from _sqlx_migrations where success");
    let applied: i64 = applied.fetch_one(&mut stack.sql().await).await.expect("counted");
    assert_eq!(usize::try_from(applied), Ok(MIGRATIONS.iter().count()));
}

async fn docker_logs(container: &str) -> String {
    // The service writes to its standard error.
    text(&finish(docker_command(&["logs", container])).await)
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn the_image_holds_the_service_and_little_else() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    stack.compose(&["build"]).await;
    let image = "fast-zero";
    for (what, expected) in [
        ("{{.Config.User}}", "65532:65532"),
        ("{{.Config.Entrypoint}}", "[/bin/fast-zero]"),
        ("{{.Config.Healthcheck.Test}}", "[CMD /bin/fast-zero healthcheck]"),
        ("{{.Config.StopSignal}}", "SIGTERM"),
        ("{{.Config.ExposedPorts}}", "map[50051/tcp:{}]"),
        ("{{index .Config.Labels \"org.opencontainers.image.title\"}}", "fast-zero"),
    ] {
        assert_eq!(inspect(image, what).await, expected, "{what}");
    }
    let environment = inspect(image, "{{.Config.Env}}").await;
    assert!(environment.contains("LISTEN_ADDR=0.0.0.0:50051"), "{environment}");
    for secret in ["SECRET_KEY", "PASSWORD", "DATABASE_URL"] {
        assert!(!environment.contains(secret), "{environment}");
    }

    let dockerfile = std::fs::read_to_string(stack.path("Dockerfile")).expect("it is there");
    let base = dockerfile.rsplit("FROM ").next().and_then(|stage| stage.lines().next());
    let base = base.expect("the last stage has a base");
    if !finish(docker_command(&["image", "inspect", base])).await.status.success() {
        docker(&["pull", "--quiet", base]).await;
    }
    let size = async |image| inspect(image, "{{.Size}}").await.parse::<u64>().expect("a number");
    let added = size(image).await - size(base).await;
    println!("the image has {added} bytes on top of its base");
    assert!(added < IMAGE_SIZE, "{added} bytes");

    let container = docker(&["create", image]).await;
    let history = docker(&["history", "--no-trunc", image]).await;
    let export = format!("docker export {}", container.trim());
    let list =
        format!("{export} | tar -tv --numeric-owner && ! {export} | grep -qa '{SECRET_KEY}'");
    let mut listing = stack.command("bash");
    listing.args(["-o", "pipefail", "-c", &list]);
    let files = finish(listing).await;
    docker(&["rm", container.trim()]).await;
    let files = succeeded(files);
    for secret in [SECRET_KEY, DATABASE_PASSWORD] {
        assert!(!history.contains(secret), "{history}");
    }
    assert!(files.contains("bin/fast-zero\n"), "{files}");
    for file in files.lines() {
        let mut columns = file.split_whitespace();
        let (mode, owner) = (columns.next().expect("a mode"), columns.next().expect("an owner"));
        let path = columns.nth(3).expect("a path");
        let (user, group) = owner.split_once('/').expect("both");
        let writable = user == "65532" || mode.as_bytes()[8] == b'w';
        let writable = writable || (group == "65532" && mode.as_bytes()[5] == b'w');
        assert!(!(mode.starts_with('-') && writable), "{file}");
        let name = path.rsplit('/').next().expect("a name");
        for unwanted in ["sh", "bash", "dash", "busybox", "cargo", ".env", ".git", "Cargo.toml"] {
            assert_ne!(name, unwanted, "{file}");
        }
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn secrets_come_from_files_too() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::configured(&[BASE, SECRETS]);
    let secrets = stack.path("secrets");
    std::fs::create_dir(&secrets).expect("created");
    let url = "postgresql://app_user:from-a-file@fastzero_database/app_db";
    for (name, secret) in [
        ("secret_key", "a secret key that is kept in a file"),
        ("postgres_password", "from-a-file"),
        ("database_url", url),
    ] {
        std::fs::write(secrets.join(name), format!("{secret}\n")).expect("written");
    }
    stack.compose(&["up", "--build", "--wait"]).await;
    stack.anonymous().await.signed_up("ana").await;
    for service in [APP, DATABASE] {
        let container = stack.container(service).await;
        let environment = inspect(&container, "{{.Config.Env}}").await;
        for secret in ["from-a-file", "kept in a file", DATABASE_PASSWORD] {
            assert!(!environment.contains(secret), "{environment}");
        }
    }
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn two_replicas_share_the_calls() {
    if !engine_answers() {
        return;
    }
    let stack = Stack::started(&[BASE, REPLICAS]).await;
    let replicas = stack.containers(APP).await;
    assert_eq!(replicas.len(), 2);
    let ana = stack.anonymous().await.signed_up("ana").await;
    let todo = ana.create_todo("Share").await;

    // Sessions are those of callers, and not of the balancer.
    let balancer = stack.containers("fastzero_balancer").await.remove(0);
    let address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = docker(&["inspect", "--format", address, &balancer]).await;
    let sessions = ana.list_sessions().await;
    assert_ne!(sessions[0].peer, address.trim());

    // The limits that the service sets on its connections stand on those of the pooler.
    let limits = "select string_agg(setting || unit, ' ' order by name) from pg_settings where name
        in ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout')";
    let url = "postgresql://app_user@127.0.0.1/app_db";
    let password = format!("PGPASSWORD={DATABASE_PASSWORD}");
    let limits = ["exec", "-T", "-e", &password, "fastzero_pgbouncer", "psql", url, "-tAc", limits];
    assert_eq!(stack.compose(&limits).await, "10000ms 5000ms 10000ms\n");

    let reached = async |replica: &str| docker_logs(replica).await.matches("GetTodo").count();
    for _ in 0..40 {
        ana.get_todo(&todo.id).await;
    }
    for replica in &replicas {
        assert!(reached(replica).await > 0, "calls reach both");
    }

    let stopping = tokio::spawn({
        let replica = replicas[0].clone();
        async move { docker(&["stop", &replica]).await }
    });
    let callers = (0..8).map(|_| {
        let (ana, id) = (ana.clone(), todo.id.clone());
        async move {
            for _ in 0..500 {
                get_with_a_retry(&ana, &id).await;
            }
        }
    });
    at_once(callers).await;
    stopping.await.expect("no panic");
    get_with_a_retry(&ana, &todo.id).await;

    let before = reached(&replicas[0]).await;
    docker(&["start", &replicas[0]]).await;
    eventually("the replica is back", async || {
        get_with_a_retry(&ana, &todo.id).await;
        sleep(Duration::from_millis(100)).await;
        reached(&replicas[0]).await > before
    })
    .await;
}

/// What a client does that was told to come back: it does, once.
async fn get_with_a_retry(client: &Client, id: &str) {
    let answer = match client.try_get_todo(id).await {
        Err(status) if status.code() == Code::Unavailable => client.try_get_todo(id).await,
        answer => answer,
    };
    answer.expect("one retry is enough");
}
