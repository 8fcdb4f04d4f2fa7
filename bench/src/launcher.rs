//! The targets of the benchmarks, and how their servers are started.

use std::{
    env,
    ffi::OsStr,
    fmt,
    path::{Path, PathBuf},
};

use tokio::process::Command;
use uuid::Uuid;

use crate::{error::Result, postgres::Database, process::die_with_parent, server::Server};

/// Settings of the service that would change its address, its keys or its work per call.
const REMOVED_SETTINGS: [&str; 9] = [
    "ALGORITHM",
    "DATABASE_URL_FILE",
    "SECRET_KEY_FILE",
    "SECRET_KEY_PREVIOUS",
    "SECRET_KEY_PREVIOUS_FILE",
    "METRICS_ADDR",
    "TLS_CERT_FILE",
    "TLS_KEY_FILE",
    "TLS_CLIENT_CA_FILE",
];

/// What a measurement is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The service: the binary of `--server`, or the one that this program built.
    Service,
    /// The binary of `--against`, or that of the service with `--against-hs256`.
    Previous,
    /// The server of [`crate::baseline`].
    Baseline,
    /// PostgreSQL without a server. [`crate::pgbench`] runs it.
    Pgbench,
}

impl fmt::Display for Target {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Service => "fast-zero",
            Self::Previous => "previous",
            Self::Baseline => "baseline",
            Self::Pgbench => "pgbench",
        })
    }
}

/// Starts the servers of all targets with the same settings.
pub struct Launcher {
    /// The binary of [`Target::Service`].
    pub service: PathBuf,
    /// The binary of [`Target::Previous`], if there is one.
    pub previous: Option<PathBuf>,
    /// Whether [`Target::Previous`] signs access tokens with HS256.
    pub previous_with_hs256: bool,
    pub run_dir: PathBuf,
    secret_key: String,
}

impl Launcher {
    pub fn new(
        service: PathBuf,
        previous: Option<PathBuf>,
        previous_with_hs256: bool,
        run_dir: PathBuf,
    ) -> Self {
        let secret_key = [Uuid::now_v7(), Uuid::now_v7()].map(|id| id.to_string()).concat();
        let previous = previous.or_else(|| previous_with_hs256.then(|| service.clone()));
        Self { service, previous, previous_with_hs256, run_dir, secret_key }
    }

    /// Returns the targets that [`Launcher::start`] accepts, the service first.
    pub fn servers(&self) -> Vec<Target> {
        let previous = self.previous.is_some().then_some(Target::Previous);
        [Some(Target::Service), previous, Some(Target::Baseline)].into_iter().flatten().collect()
    }

    pub async fn start(&self, target: Target, database: &Database) -> Result<Server> {
        let mut command = match target {
            Target::Service => die_with_parent(&self.service)?,
            Target::Previous => {
                die_with_parent(self.previous.as_ref().ok_or("no binary to compare against")?)?
            }
            Target::Baseline => {
                let mut command = die_with_parent(env::current_exe()?)?;
                command.arg("baseline");
                command
            }
            Target::Pgbench => return Err("pgbench is not a server".into()),
        };
        self.configure(&mut command, database);
        if self.has_hs256_tokens(target) {
            command.env("ALGORITHM", "HS256");
        }
        Server::start(command, &self.run_dir.join("server.log")).await
    }

    /// Returns `true` if the access tokens of calls to a target are signed with HS256. The baseline
    /// verifies each token, as a bare server does, which is cheap only with HS256.
    pub fn has_hs256_tokens(&self, target: Target) -> bool {
        match target {
            Target::Service | Target::Pgbench => false,
            Target::Previous => self.previous_with_hs256,
            Target::Baseline => true,
        }
    }

    /// Starts the service with HS256, which logs the callers of such targets in.
    pub async fn start_with_hs256(&self, database: &Database) -> Result<Server> {
        let mut command = die_with_parent(&self.service)?;
        self.configure(&mut command, database);
        command.env("ALGORITHM", "HS256");
        Server::start(command, &self.run_dir.join("server.log")).await
    }

    /// Starts a replica of the service, which serves its metrics.
    pub async fn start_replica(&self, number: usize, database: &Database) -> Result<Server> {
        let mut command = die_with_parent(&self.service)?;
        self.configure(&mut command, database);
        command.env("METRICS_ADDR", "127.0.0.1:0");
        Server::start(command, &self.run_dir.join(format!("replica{number}.log"))).await
    }

    /// Runs the service's `healthcheck` subcommand. Returns an error unless the server is
    /// SERVING.
    pub async fn check_health(&self, server: &Server, database: &Database) -> Result<()> {
        let mut command = die_with_parent(&self.service)?;
        command.args(["healthcheck", "--addr", &server.address]);
        self.configure(&mut command, database);
        let output = command.output().await?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(format!("healthcheck ended with {}: {stderr}", output.status).into())
    }

    fn configure(&self, command: &mut Command, database: &Database) {
        for variable in REMOVED_SETTINGS {
            command.env_remove(variable);
        }
        command
            // The current directory of this program may contain a `.env` file.
            .current_dir(&self.run_dir)
            .env("DATABASE_URL", &database.url)
            .env("SECRET_KEY", &self.secret_key)
            .env("LISTEN_ADDR", "127.0.0.1:0")
            .env("LOG_FORMAT", "json")
            // One day: longer than any run, so that no access token expires.
            .env("ACCESS_TOKEN_EXPIRE_MINUTES", "1440")
            // All calls come from one client IP address.
            .env("SIGN_UPS_PER_PEER_PER_MINUTE", "1000000")
            .env("MAX_CONNECTIONS_PER_PEER", "2048")
            .env("MAX_WATCHES_PER_PEER", "2048");
    }
}

/// Builds the service with the profile of this program and returns the binary.
pub async fn build_service() -> Result<PathBuf> {
    let executable = env::current_exe()?;
    // The executable is `<target directory>/<profile>/bench`.
    let profile_dir = executable.parent().ok_or("the executable has no parent directory")?;
    let target_dir = profile_dir.parent().ok_or("the executable is not in a target directory")?;
    let profile = profile_dir.file_name().and_then(OsStr::to_str).ok_or("unknown profile")?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--locked", "--package", "fast-zero", "--bin", "fast-zero"])
        // The container image has this feature, too.
        .args(["--features", "jemalloc"])
        .args(["--profile", profile, "--target-dir"])
        .arg(target_dir)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .kill_on_drop(true)
        .status()
        .await?;
    if !status.success() {
        return Err(format!("cargo build ended with {status}").into());
    }
    Ok(profile_dir.join("fast-zero"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_previous_binary_is_a_target_only_if_it_is_given() {
        let servers = |previous| Launcher::new("a".into(), previous, false, "b".into()).servers();
        assert_eq!(servers(None), [Target::Service, Target::Baseline]);
        assert_eq!(
            servers(Some("c".into())),
            [Target::Service, Target::Previous, Target::Baseline]
        );
    }

    #[test]
    fn the_service_is_compared_with_itself_and_hs256() {
        let launcher = Launcher::new("a".into(), None, true, "b".into());
        assert_eq!(launcher.previous.as_deref(), Some(Path::new("a")));
        let hs256 = launcher.servers().into_iter().filter(|it| launcher.has_hs256_tokens(*it));
        assert_eq!(hs256.collect::<Vec<_>>(), [Target::Previous, Target::Baseline]);
    }
}
