//! The stack that compose starts, as its users start it.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use fast_zero::database;
use sqlx::{ConnectOptions, PgConnection};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

use super::{Client, app::SECRET_KEY, postgres::tell};

/// What the containers are made from.
const SOURCES: [&str; 13] = [
    ".cargo",
    ".dockerignore",
    ".env.example",
    ".sqlx",
    "Cargo.lock",
    "Cargo.toml",
    "Dockerfile",
    "bench",
    "build.rs",
    "compose.yaml",
    "deploy",
    "migrations",
    "proto",
];

/// A password with all that a URL, a shell or compose could take for something else.
pub const DATABASE_PASSWORD: &str = "p%40/:#@ $HOME ?&=+";

/// How long a container may take for anything.
const PATIENCE: Duration = Duration::from_mins(1);

/// How long a command may take: one may build the image from nothing.
const COMMAND_LIMIT: Duration = Duration::from_mins(30);

/// A project of its own, on ports of its own, from a copy of the sources. Nothing is left
/// of it when this is dropped, but for the image.
pub struct Stack {
    folder: TempDir,
    /// Its name, with which those of its containers and networks begin.
    pub project: String,
    files: Vec<&'static str>,
    /// Where the service and its database are published.
    pub port: u16,
    pub database_port: u16,
}

/// Whether a Docker engine answers; says so if none does.
pub fn engine_answers() -> bool {
    let answers = Command::new("docker").arg("version").output();
    let answers = answers.is_ok_and(|output| output.status.success());
    if !answers {
        tell("SKIPPED: the containers: no Docker engine answers");
    }
    answers
}

impl Stack {
    /// Nothing runs yet, and there is no `.env`.
    pub fn bare(files: &[&'static str]) -> Self {
        let folder = TempDir::new().expect("a folder");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for source in SOURCES.into_iter().chain(["src"]) {
            copy(&root.join(source), &folder.path().join(source));
        }
        // A run that is killed leaves containers; they must not come back with the engine.
        for file in ["compose.yaml", "deploy/compose.replicas.yaml"] {
            let file = folder.path().join(file);
            let text = fs::read_to_string(&file).expect("it is there");
            fs::write(file, text.replace("restart: unless-stopped", "restart: \"no\""))
                .expect("written");
        }
        let project = format!("fast-zero-test-{}", Uuid::now_v7().simple());
        let (port, database_port) = (free_port(), free_port());
        Self { folder, project, files: files.to_vec(), port, database_port }
    }

    /// Nothing runs yet; `.env` is filled in.
    pub fn configured(files: &[&'static str]) -> Self {
        let stack = Self::bare(files);
        let env = fs::read_to_string(stack.path(".env.example")).expect("it is there");
        let env = env.replace("=app_password", &format!("='{DATABASE_PASSWORD}'"));
        let env = format!("{env}\nSECRET_KEY='{SECRET_KEY}'\n");
        fs::write(stack.path(".env"), env).expect("written");
        stack
    }

    /// All of it runs, and is healthy.
    pub async fn started(files: &[&'static str]) -> Self {
        let stack = Self::configured(files);
        stack.compose(&["up", "--build", "--wait"]).await;
        stack
    }

    /// A file of the copy.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A command in the folder, for this project.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .env("COMPOSE_PROJECT_NAME", &self.project)
            .env("COMPOSE_FILE", self.files.join(":"))
            .env("FASTZERO_PORT", self.port.to_string())
            .env("POSTGRES_PORT", self.database_port.to_string());
        command
    }

    /// Runs `docker compose`, which may fail.
    pub async fn try_compose(&self, arguments: &[&str]) -> Output {
        let mut command = self.command("docker");
        command.arg("compose").args(arguments);
        finish(command).await
    }

    /// Runs `docker compose`: what it wrote to its output.
    pub async fn compose(&self, arguments: &[&str]) -> String {
        succeeded(self.try_compose(arguments).await)
    }

    /// The containers of a service.
    pub async fn containers(&self, service: &str) -> Vec<String> {
        let ids = self.compose(&["ps", "--all", "--quiet", service]).await;
        ids.lines().map(str::to_owned).collect()
    }

    /// The one container of a service.
    pub async fn container(&self, service: &str) -> String {
        let containers = self.containers(service).await;
        assert_eq!(containers.len(), 1, "{service}");
        containers.into_iter().next().expect("one")
    }

    /// Waits until the service's container is in this state of health.
    pub async fn until_health(&self, service: &str, health: &str) {
        let container = self.container(service).await;
        let asking = async {
            while inspect(&container, "{{.State.Health.Status}}").await != health {
                sleep(Duration::from_millis(200)).await;
            }
        };
        let asked = timeout(PATIENCE, asking).await;
        asked.unwrap_or_else(|_| panic!("{service} does not become {health}"));
    }

    /// A caller without a token, by way of the published port.
    pub async fn anonymous(&self) -> Client {
        Client::new(self.channel().await)
    }

    /// A new connection to the published port.
    pub async fn channel(&self) -> Channel {
        let address = format!("http://127.0.0.1:{}", self.port);
        let endpoint = Endpoint::from_shared(address).expect("a good address");
        endpoint.connect().await.expect("the service answers")
    }

    /// A connection to the database, by way of its published port.
    pub async fn sql(&self) -> PgConnection {
        let url = format!("postgresql://app_user@127.0.0.1:{}/app_db", self.database_port);
        let options = database::parse_url(&url).expect("a good URL").password(DATABASE_PASSWORD);
        options.connect().await.expect("the database answers")
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What the containers had to say goes with them.
            let mut logs = self.command("docker");
            let logs = logs.args(["compose", "logs", "--no-color", "--tail=50"]).output();
            eprintln!("{}", logs.map(|logs| text(&logs)).unwrap_or_default());
        }
        let mut down = self.command("docker");
        down.args(["compose", "down", "--volumes", "--remove-orphans", "--timeout=1"]);
        // Without an .env it could not read its own files.
        down.env("SECRET_KEY", "-").env("POSTGRES_PASSWORD", "-");
        let _ = down.output();
    }
}

/// Runs `docker`, which must not fail: what it wrote to its output.
pub async fn docker(arguments: &[&str]) -> String {
    succeeded(finish(docker_command(arguments)).await)
}

/// A `docker` that is about to run.
pub fn docker_command(arguments: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.args(arguments).stdin(Stdio::null());
    command
}

/// What the engine knows of a container or an image.
pub async fn inspect(id: &str, format: &str) -> String {
    docker(&["inspect", "--format", format, id]).await.trim().to_owned()
}

/// Waits for the end of a command.
pub async fn finish(command: Command) -> Output {
    let mut command = tokio::process::Command::from(command);
    let output = timeout(COMMAND_LIMIT, command.kill_on_drop(true).output());
    output.await.expect("it ends in time").expect("the program is there")
}

/// What a command that did not fail wrote to its output.
#[track_caller]
pub fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).expect("it writes text")
}

/// All that a command wrote.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&*output.stdout, &*output.stderr].concat()).into_owned()
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir(to).expect("a folder");
        for entry in fs::read_dir(from).expect("a folder") {
            let entry = entry.expect("read");
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::copy(from, to).expect("copied");
    }
}

/// A port on which nobody listens, at the moment.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}
