//! The PostgreSQL of a run, and the databases in it.

use std::{
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{self, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdin, Command},
    time::{Instant, sleep, timeout},
};
use tokio_postgres::{Client, Config, NoTls};

use crate::{
    Result,
    process::{Stat, because, cpu_of_family},
};

/// A first start fetches PostgreSQL.
const START_LIMIT: Duration = Duration::from_mins(10);
/// Longer than `fast-zero postgres` gives its PostgreSQL.
const STOP_LIMIT: Duration = Duration::from_secs(12);
/// How long the connections of a server that has ended may take to end.
const QUIET_LIMIT: Duration = Duration::from_secs(10);
const QUIET_PAUSE: Duration = Duration::from_millis(5);

/// Where the folder of a run is made. Not `TMPDIR`: PostgreSQL's user must be able to
/// enter it.
const TEMPORARY: &str = "/tmp";
const PREFIX: &str = "fast-zero-bench-";
/// Names of databases begin with this.
const DATABASE_PREFIX: &str = "fast_zero_bench_";

/// The folder of a run, removed when it is dropped. One whose run was killed is removed by
/// the next.
#[derive(Debug)]
pub struct Folder {
    folder: TempDir,
    /// Held as long as the run lasts.
    _lock: File,
}

impl Folder {
    pub fn make() -> Result<Self> {
        for entry in fs::read_dir(TEMPORARY)?.flatten() {
            let is_ours = entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes());
            let lock = is_ours.then(|| File::open(entry.path().join("lock")).ok()).flatten();
            if lock.is_some_and(|lock| lock.try_lock().is_ok()) {
                // Another run may be faster.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let everybody = Permissions::from_mode(0o755);
        let folder =
            tempfile::Builder::new().prefix(PREFIX).permissions(everybody).tempdir_in(TEMPORARY)?;
        // Under another name until it is held.
        let lock = File::create(folder.path().join("lock.new"))?;
        lock.try_lock().map_err(|error| because("holding a new folder", error))?;
        fs::rename(folder.path().join("lock.new"), folder.path().join("lock"))?;
        Ok(Self { folder, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

/// A PostgreSQL.
pub struct Postgres {
    /// Of a database that is there already, for what is not measured.
    url: String,
    admin: Client,
    /// What it calls itself.
    pub version: String,
    /// Its main process, if that runs on this machine.
    pid: Option<i32>,
    private: Option<Private>,
}

/// The private PostgreSQL of the service's binary: as durable as for its users, because a
/// commit that is not flushed would cost next to nothing.
struct Private {
    process: Child,
    lifeline: ChildStdin,
}

impl Postgres {
    /// Reaches the one at `url`, or starts one that keeps its data in `folder`.
    pub async fn open(url: Option<&str>, fast_zero: &Path, folder: &Path) -> Result<Self> {
        let (url, private) = if let Some(url) = url {
            (url.to_owned(), None)
        } else {
            let (url, private) = Private::start(fast_zero, folder).await?;
            (url, Some(private))
        };
        let admin = connect(&config(&url)?).await?;
        let version = admin.query_one("show server_version", &[]).await?.get(0);
        let pid = main_process(&admin).await?;
        let postgres = Self { url, admin, version, pid, private };
        // Of runs that were killed. One in use cannot be dropped.
        postgres.drop_all(DATABASE_PREFIX, "").await?;
        Ok(postgres)
    }

    pub fn is_private(&self) -> bool {
        self.private.is_some()
    }

    /// Makes a database.
    pub async fn create(&self, name: &str) -> Result<Database> {
        let name = own_prefix() + name;
        let create = format!("create database {name} template template0 encoding 'UTF8'");
        self.admin.batch_execute(&create).await?;
        Ok(Database { url: with_database(&self.url, &name), name })
    }

    /// Drops the databases whose names begin so, as far as that can be done.
    async fn drop_all(&self, prefix: &str, how: &str) -> Result<()> {
        let names = "select datname::text from pg_database where starts_with(datname, $1)";
        for row in self.admin.query(names, &[&prefix]).await? {
            let name: String = row.get(0);
            let _ = self.admin.batch_execute(&format!("drop database {name} {how}")).await;
        }
        Ok(())
    }

    /// CPU time of all its processes; `None` if it runs elsewhere.
    pub fn cpu(&self) -> Result<Option<Duration>> {
        self.pid.map(cpu_of_family).transpose()
    }

    /// How many transactions have ended in a database. Each statement outside of a
    /// transaction is one. Waits until no connection is left, because each tells of its
    /// own at its end, and before that only now and then.
    pub async fn transactions(&self, database: &Database) -> Result<i64> {
        let connections = "select count(*) from pg_stat_activity where datname = $1";
        let give_up_at = Instant::now() + QUIET_LIMIT;
        loop {
            let row = self.admin.query_one(connections, &[&database.name]).await?;
            if row.get::<_, i64>(0) == 0 {
                break;
            }
            if Instant::now() > give_up_at {
                return Err("connections to the database do not end".into());
            }
            sleep(QUIET_PAUSE).await;
        }
        let transactions =
            "select xact_commit + xact_rollback from pg_stat_database where datname = $1";
        Ok(self.admin.query_one(transactions, &[&database.name]).await?.get(0))
    }

    /// Leaves nothing.
    pub async fn close(self) {
        let Some(Private { mut process, lifeline }) = self.private else {
            if let Err(error) = self.drop_all(&own_prefix(), "with (force)").await {
                eprintln!("bench: the databases of this run are left: {error}");
            }
            return;
        };
        drop(lifeline);
        if timeout(STOP_LIMIT, process.wait()).await.is_err() {
            eprintln!("bench: the private PostgreSQL does not end");
        }
    }
}

impl Private {
    async fn start(fast_zero: &Path, folder: &Path) -> Result<(String, Self)> {
        let mut process = Command::new(fast_zero)
            .args(["postgres", "--lifeline"])
            .env("FASTZERO_DATA_DIR", folder.join("data"))
            .env("RUST_LOG", "warn")
            .current_dir(folder)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lifeline = process.stdin.take().ok_or("it is piped")?;
        let mut stdout = BufReader::new(process.stdout.take().ok_or("it is piped")?);
        let mut url = String::new();
        timeout(START_LIMIT, stdout.read_line(&mut url)).await??;
        if url.is_empty() {
            return Err("the private PostgreSQL did not start".into());
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
        config(&self.url)
    }

    pub async fn connect(&self) -> Result<Client> {
        connect(&self.config()?).await
    }
}

fn own_prefix() -> String {
    format!("{DATABASE_PREFIX}{}_", process::id())
}

async fn connect(config: &Config) -> Result<Client> {
    let (client, connection) = config.connect(NoTls).await?;
    // Its errors come to the client, too.
    tokio::spawn(connection);
    Ok(client)
}

/// The process that has started the one behind a connection, if that is on this machine:
/// its title names its database.
async fn main_process(client: &Client) -> Result<Option<i32>> {
    let row = client.query_one("select pg_backend_pid(), current_database()::text", &[]).await?;
    let (pid, database): (i32, String) = (row.get(0), row.get(1));
    let title = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    if !title.contains("postgres") || !title.contains(&database) {
        return Ok(None);
    }
    Ok(Some(Stat::of(pid)?.parent))
}

/// For tokio-postgres, which takes the host among the parameters as one more, where it
/// stands instead of the other for everybody else.
pub fn config(url: &str) -> Result<Config> {
    let (before, parameters) = url.split_once('?').unwrap_or((url, ""));
    let names_host = parameters.split('&').any(|parameter| parameter.starts_with("host="));
    if names_host
        && let Some((user, place)) = before.rsplit_once('@')
        && let Some((_, database)) = place.split_once('/')
    {
        return Ok(format!("{user}@/{database}?{parameters}").parse()?);
    }
    Ok(url.parse()?)
}

/// The URL of another database in the same PostgreSQL.
fn with_database(url: &str, name: &str) -> String {
    let (before, parameters) = url.split_once('?').unwrap_or((url, ""));
    let authority = before.find("://").map_or(0, |at| at + "://".len());
    let end = before[authority..].find('/').map_or(before.len(), |at| authority + at);
    let separator = if parameters.is_empty() { "" } else { "?" };
    format!("{}/{name}{separator}{parameters}", &before[..end])
}

/// Where the programs of an installed PostgreSQL are found, this among them.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use tokio_postgres::config::Host;

    use super::*;

    #[test]
    fn only_the_database_is_another() {
        for (url, other) in [
            ("postgresql://a:b@c/d", "postgresql://a:b@c/x"),
            ("postgresql://c", "postgresql://c/x"),
            ("postgres://a@c:5/?sslmode=disable", "postgres://a@c:5/x?sslmode=disable"),
            ("postgresql://c/d?host=%2Ftmp%2Fs", "postgresql://c/x?host=%2Ftmp%2Fs"),
        ] {
            assert_eq!(with_database(url, "x"), other);
        }
    }

    #[test]
    fn a_host_among_the_parameters_is_the_only_one() {
        let config =
            config("postgresql://a:b@localhost/d?host=%2Ftmp%2Fs&port=5433").expect("good");
        assert_eq!(config.get_hosts(), [Host::Unix("/tmp/s".into())]);
        assert_eq!(config.get_ports(), [5433]);
        assert_eq!(config.get_password(), Some(&b"b"[..]));
        assert_eq!(config.get_dbname(), Some("d"));
    }
}
