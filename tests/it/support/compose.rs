//! The stacks of compose, started as users start them.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    str::FromStr,
    time::Duration,
};

use sqlx::{ConnectOptions, PgConnection, postgres::PgConnectOptions};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint};
use uuid::Uuid;

use super::{Client, app::SECRET_KEY, postgres::print_line};

/// The sources of the containers.
const SOURCES: [&str; 15] = [
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
    "crates",
    "deploy",
    "examples/rust",
    "migrations",
    "proto",
];

/// A password with characters that URLs, shells and compose treat specially.
pub const DATABASE_PASSWORD: &str = "p%40/:#@ $HOME ?&=+";

/// The timeout for a change of a container.
const TIMEOUT: Duration = Duration::from_mins(1);

/// The timeout for a command, which may build the image.
const COMMAND_TIMEOUT: Duration = Duration::from_mins(30);

/// A compose project with its own name and ports, in a copy of the sources. Dropping it
/// removes everything but the image.
pub struct Stack {
    dir: TempDir,
    /// The name, which prefixes the names of containers and networks.
    pub project: String,
    files: Vec<&'static str>,
    /// The published ports of the service and its database.
    pub port: u16,
    pub database_port: u16,
}

/// Returns `true` if a Docker engine is available. Otherwise prints that the test is
/// skipped.
pub fn is_engine_available() -> bool {
    let version = Command::new("docker").arg("version").output();
    let is_available = version.is_ok_and(|output| output.status.success());
    if !is_available {
        print_line("SKIPPED: the containers: no Docker engine is available");
    }
    is_available
}

impl Stack {
    /// Copies the sources, without a `.env`, and starts nothing.
    pub fn without_env_file(files: &[&'static str]) -> Self {
        let dir = TempDir::new().expect("a directory");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for source in SOURCES.into_iter().chain(["src"]) {
            copy(&root.join(source), &dir.path().join(source));
        }
        // A killed run leaves containers behind. The engine must not restart them.
        for file in ["compose.yaml", "deploy/compose.replicas.yaml"] {
            let file = dir.path().join(file);
            let text = fs::read_to_string(&file).expect("the file exists");
            fs::write(file, text.replace("restart: unless-stopped", "restart: \"no\""))
                .expect("written");
        }
        let project = format!("fast-zero-test-{}", Uuid::now_v7().simple());
        let (port, database_port) = (free_port(), free_port());
        Self { dir, project, files: files.to_vec(), port, database_port }
    }

    /// Copies the sources, with a complete `.env`, and starts nothing.
    pub fn configured(files: &[&'static str]) -> Self {
        let stack = Self::without_env_file(files);
        let env = fs::read_to_string(stack.path(".env.example")).expect("the file exists");
        let env = env.replace("=app_password", &format!("='{DATABASE_PASSWORD}'"));
        let env = format!("{env}\nSECRET_KEY='{SECRET_KEY}'\n");
        fs::write(stack.path(".env"), env).expect("written");
        stack
    }

    /// Starts the stack, and waits until it is healthy.
    pub async fn started(files: &[&'static str]) -> Self {
        let stack = Self::configured(files);
        stack.compose(&["up", "--build", "--wait"]).await;
        stack
    }

    /// Returns the path of a file in the copy.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Prepares a command in the directory, for this project.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.dir)
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
        run_command(command).await
    }

    /// Runs `docker compose`, and returns its standard output.
    pub async fn compose(&self, arguments: &[&str]) -> String {
        expect_success(self.try_compose(arguments).await)
    }

    /// Returns the containers of a service.
    pub async fn containers(&self, service: &str) -> Vec<String> {
        let ids = self.compose(&["ps", "--all", "--quiet", service]).await;
        ids.lines().map(str::to_owned).collect()
    }

    /// Returns the only container of a service.
    pub async fn container(&self, service: &str) -> String {
        let containers = self.containers(service).await;
        assert_eq!(containers.len(), 1, "{service}");
        containers.into_iter().next().expect("a container")
    }

    /// Waits until the container of a service has this health status.
    pub async fn wait_until_health(&self, service: &str, health: &str) {
        let container = self.container(service).await;
        let polling = async {
            while inspect(&container, "{{.State.Health.Status}}").await != health {
                sleep(Duration::from_millis(200)).await;
            }
        };
        let result = timeout(TIMEOUT, polling).await;
        result.unwrap_or_else(|_| panic!("{service} does not become {health}"));
    }

    /// Returns a client without a token, at the published port.
    pub async fn anonymous(&self) -> Client {
        Client::new(self.channel().await)
    }

    /// Connects to the published port.
    pub async fn channel(&self) -> Channel {
        let address = format!("http://127.0.0.1:{}", self.port);
        let endpoint = Endpoint::from_shared(address).expect("a valid URL");
        endpoint.connect().await.expect("the service accepts connections")
    }

    /// Connects to the database, at its published port.
    pub async fn connect_database(&self) -> PgConnection {
        let url = format!("postgresql://app_user@127.0.0.1:{}/app_db", self.database_port);
        let options =
            PgConnectOptions::from_str(&url).expect("a valid URL").password(DATABASE_PASSWORD);
        options.connect().await.expect("the database accepts connections")
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The logs are removed with the containers.
            let mut logs = self.command("docker");
            let logs = logs.args(["compose", "logs", "--no-color", "--tail=50"]).output();
            eprintln!("{}", logs.map(|logs| combined_output(&logs)).unwrap_or_default());
        }
        let mut down = self.command("docker");
        down.args(["compose", "down", "--volumes", "--remove-orphans", "--timeout=1"]);
        // Without a `.env`, compose could not read its files.
        down.env("SECRET_KEY", "-").env("POSTGRES_PASSWORD", "-");
        let _ = down.output();
    }
}

/// Runs `docker`, which must succeed, and returns its standard output.
pub async fn docker(arguments: &[&str]) -> String {
    expect_success(run_command(docker_command(arguments)).await)
}

/// Prepares `docker`.
pub fn docker_command(arguments: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Inspects a container or an image.
pub async fn inspect(id: &str, format: &str) -> String {
    docker(&["inspect", "--format", format, id]).await.trim().to_owned()
}

/// Runs a command until it exits.
pub async fn run_command(command: Command) -> Output {
    let mut command = tokio::process::Command::from(command);
    let output = timeout(COMMAND_TIMEOUT, command.kill_on_drop(true).output());
    output.await.expect("an exit in time").expect("an installed program")
}

/// Asserts that a command succeeded, and returns its standard output.
#[track_caller]
pub fn expect_success(output: Output) -> String {
    assert!(output.status.success(), "{}", combined_output(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Returns the standard output and standard error of a command.
pub fn combined_output(output: &Output) -> String {
    String::from_utf8_lossy(&[&*output.stdout, &*output.stderr].concat()).into_owned()
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir_all(to).expect("a directory");
        for entry in fs::read_dir(from).expect("a directory") {
            let entry = entry.expect("read");
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::copy(from, to).expect("copied");
    }
}

/// Returns a port that is free at the moment.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("an address").port()
}
