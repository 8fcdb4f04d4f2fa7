//! The PostgreSQL server of a run, and the databases in it.

use std::{
    fs,
    path::Path,
    process::{self, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdin, Command},
    time::{Instant, sleep, timeout},
};
use tokio_postgres::{Client, Config, NoTls};

use crate::{
    error::Result,
    procfs::{ProcessStat, cpu_with_children},
};

/// The first start downloads PostgreSQL.
const START_TIMEOUT: Duration = Duration::from_mins(10);
/// Longer than `fast-zero postgres` waits for PostgreSQL to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(12);
/// How long the connections of a stopped server may take to end.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const DISCONNECT_POLL_INTERVAL: Duration = Duration::from_millis(5);

const DATABASE_PREFIX: &str = "fast_zero_bench_";

pub struct Postgres {
    /// The URL of an existing database, which is used for administration only.
    url: String,
    admin: Client,
    /// PostgreSQL's `server_version`.
    pub version: String,
    /// The process ID of the postmaster, if it runs on this machine.
    pid: Option<i32>,
    embedded: Option<EmbeddedPostgres>,
}

/// The embedded PostgreSQL of the service's binary.
///
/// It is durable (`fsync=on`), as for the users of the service: a commit without a flush
/// would cost next to nothing.
struct EmbeddedPostgres {
    process: Child,
    /// The standard input of the process. PostgreSQL stops when it closes.
    lifeline: ChildStdin,
}

impl Postgres {
    /// Connects to the server at `url`, or starts an embedded one with its data in `dir`.
    pub async fn open(url: Option<&str>, fast_zero: &Path, dir: &Path) -> Result<Self> {
        let (url, embedded) = if let Some(url) = url {
            (url.to_owned(), None)
        } else {
            let (url, embedded) = EmbeddedPostgres::start(fast_zero, dir).await?;
            (url, Some(embedded))
        };
        let admin = connect(&parse_url(&url)?).await?;
        let version = admin.query_one("show server_version", &[]).await?.get(0);
        let pid = postmaster_pid(&admin).await?;
        let postgres = Self { url, admin, version, pid, embedded };
        // Killed runs leave databases behind. A database in use cannot be dropped.
        postgres.drop_databases(DATABASE_PREFIX, "").await?;
        Ok(postgres)
    }

    pub fn is_embedded(&self) -> bool {
        self.embedded.is_some()
    }

    pub async fn create_database(&self, name: &str) -> Result<Database> {
        let name = run_prefix() + name;
        let create = format!("create database {name} template template0 encoding 'UTF8'");
        self.admin.batch_execute(&create).await?;
        Ok(Database { url: with_database(&self.url, &name), name })
    }

    /// Drops the databases with this name prefix. Ignores those that cannot be dropped.
    async fn drop_databases(&self, prefix: &str, options: &str) -> Result<()> {
        let names = "select datname::text from pg_database where starts_with(datname, $1)";
        for row in self.admin.query(names, &[&prefix]).await? {
            let name: String = row.get(0);
            let _ = self.admin.batch_execute(&format!("drop database {name} {options}")).await;
        }
        Ok(())
    }

    /// Returns the CPU time of all PostgreSQL processes, or `None` if they run on another
    /// machine.
    pub fn cpu(&self) -> Result<Option<Duration>> {
        self.pid.map(cpu_with_children).transpose()
    }

    /// Returns the number of transactions that have ended in a database. Each statement
    /// outside of a transaction block is one.
    ///
    /// Waits until the database has no connection: a backend reports its transactions
    /// when it exits, and before that with a delay.
    pub async fn transactions(&self, database: &Database) -> Result<i64> {
        let connections = "select count(*) from pg_stat_activity where datname = $1";
        let deadline = Instant::now() + DISCONNECT_TIMEOUT;
        loop {
            let row = self.admin.query_one(connections, &[&database.name]).await?;
            if row.get::<_, i64>(0) == 0 {
                break;
            }
            if Instant::now() > deadline {
                return Err("connections to the database are still open".into());
            }
            sleep(DISCONNECT_POLL_INTERVAL).await;
        }
        let transactions =
            "select xact_commit + xact_rollback from pg_stat_database where datname = $1";
        Ok(self.admin.query_one(transactions, &[&database.name]).await?.get(0))
    }

    /// Drops the databases of this run, or stops the embedded server.
    pub async fn close(self) {
        let Some(EmbeddedPostgres { mut process, lifeline }) = self.embedded else {
            if let Err(error) = self.drop_databases(&run_prefix(), "with (force)").await {
                eprintln!("bench: cannot drop the databases of this run: {error}");
            }
            return;
        };
        drop(lifeline);
        if timeout(STOP_TIMEOUT, process.wait()).await.is_err() {
            eprintln!("bench: the embedded PostgreSQL did not stop in time");
        }
    }
}

impl EmbeddedPostgres {
    async fn start(fast_zero: &Path, dir: &Path) -> Result<(String, Self)> {
        let mut process = Command::new(fast_zero)
            .args(["postgres", "--lifeline"])
            .env("FASTZERO_DATA_DIR", dir.join("data"))
            .env("RUST_LOG", "warn")
            .current_dir(dir)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lifeline = process.stdin.take().ok_or("standard input is not piped")?;
        let stdout = process.stdout.take().ok_or("standard output is not piped")?;
        let mut url = String::new();
        timeout(START_TIMEOUT, BufReader::new(stdout).read_line(&mut url)).await??;
        if url.is_empty() {
            return Err("the embedded PostgreSQL did not start".into());
        }
        Ok((url.trim_end().to_owned(), Self { process, lifeline }))
    }
}

/// A database of this run.
#[derive(Clone, Debug)]
pub struct Database {
    name: String,
    pub url: String,
}

impl Database {
    pub fn config(&self) -> Result<Config> {
        parse_url(&self.url)
    }

    pub async fn connect(&self) -> Result<Client> {
        connect(&self.config()?).await
    }
}

/// Returns the name prefix of the databases that this process creates.
fn run_prefix() -> String {
    format!("{DATABASE_PREFIX}{}_", process::id())
}

async fn connect(config: &Config) -> Result<Client> {
    let (client, connection) = config.connect(NoTls).await?;
    // The client's calls report the errors of the connection.
    tokio::spawn(connection);
    Ok(client)
}

/// Returns the process ID of the postmaster, or `None` if it runs on another machine.
///
/// The backend of this connection runs here if the process with its ID has its title,
/// which contains the database name.
async fn postmaster_pid(client: &Client) -> Result<Option<i32>> {
    let row = client.query_one("select pg_backend_pid(), current_database()::text", &[]).await?;
    let (pid, database): (i32, String) = (row.get(0), row.get(1));
    let title = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if !title.contains("postgres") || !title.contains(&database) {
        return Ok(None);
    }
    Ok(Some(ProcessStat::read(pid)?.parent))
}

/// Parses a connection URL as libpq does.
///
/// In libpq, the parameter `host` replaces the host of the authority. tokio-postgres
/// would try both hosts, so the authority's host is removed here.
pub fn parse_url(url: &str) -> Result<Config> {
    let (base, parameters) = url.split_once('?').unwrap_or((url, ""));
    let has_host = parameters.split('&').any(|parameter| parameter.starts_with("host="));
    if has_host
        && let Some((user, host_and_path)) = base.rsplit_once('@')
        && let Some((_, database)) = host_and_path.split_once('/')
    {
        return Ok(format!("{user}@/{database}?{parameters}").parse()?);
    }
    Ok(url.parse()?)
}

/// Replaces the database name in a connection URL.
fn with_database(url: &str, name: &str) -> String {
    let (base, parameters) = url.split_once('?').unwrap_or((url, ""));
    let authority = base.find("://").map_or(0, |at| at + "://".len());
    let end = base[authority..].find('/').map_or(base.len(), |at| authority + at);
    let separator = if parameters.is_empty() { "" } else { "?" };
    format!("{}/{name}{separator}{parameters}", &base[..end])
}

#[cfg(test)]
mod tests {
    use tokio_postgres::config::Host;

    use super::*;

    #[test]
    fn only_the_database_name_is_replaced() {
        for (url, replaced) in [
            ("postgresql://a:b@c/d", "postgresql://a:b@c/x"),
            ("postgresql://c", "postgresql://c/x"),
            ("postgres://a@c:5/?sslmode=disable", "postgres://a@c:5/x?sslmode=disable"),
            ("postgresql://c/d?host=%2Ftmp%2Fs", "postgresql://c/x?host=%2Ftmp%2Fs"),
        ] {
            assert_eq!(with_database(url, "x"), replaced);
        }
    }

    #[test]
    fn the_host_parameter_replaces_the_host_of_the_authority() {
        let config =
            parse_url("postgresql://a:b@localhost/d?host=%2Ftmp%2Fs&port=5433").expect("valid");
        assert_eq!(config.get_hosts(), [Host::Unix("/tmp/s".into())]);
        assert_eq!(config.get_ports(), [5433]);
        assert_eq!(config.get_password(), Some(&b"b"[..]));
        assert_eq!(config.get_dbname(), Some("d"));
    }
}
