//! The PostgreSQL of the tests: that of `TEST_DATABASE_URL`, a container if a Docker engine
//! has the image, or the embedded one. The latter two stop when the run ends, even if it is
//! killed.

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    str::FromStr,
    sync::{
        LazyLock,
        mpsc::{self, Sender},
    },
    thread,
    time::{Duration, UNIX_EPOCH},
};

use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection, migrate::Migrator,
    postgres::PgConnectOptions,
};
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::container::{self, Container};

/// The migrations of the service.
pub static MIGRATIONS: Migrator = sqlx::migrate!();

/// The PostgreSQL of the run.
struct Postgres {
    admin: PgConnectOptions,
    /// The name of the migrated database that is the template for those of the tests.
    template: String,
    /// The embedded PostgreSQL. Its standard input is the lifeline: it stops when this process
    /// exits.
    _embedded: Option<Child>,
}

static POSTGRES: OnceCell<Postgres> = OnceCell::const_new();

/// The database of one test. Dropping the value drops the database.
#[derive(Debug)]
pub struct TestDatabase {
    pub options: PgConnectOptions,
    admin: PgConnectOptions,
    name: String,
}

impl TestDatabase {
    /// Creates a migrated database without rows.
    pub async fn create() -> Self {
        let postgres = POSTGRES.get_or_init(Postgres::start).await;
        Self::create_as(postgres, &format!("template {}", postgres.template)).await
    }

    /// Creates a database without tables, with options of CREATE DATABASE.
    pub async fn create_empty(options: &str) -> Self {
        let postgres = POSTGRES.get_or_init(Postgres::start).await;
        Self::create_as(postgres, options).await
    }

    async fn create_as(postgres: &Postgres, options: &str) -> Self {
        let name = format!("test_{}", Uuid::now_v7().simple());
        execute(&postgres.admin, format!("create database {name} {options}")).await;
        let admin = postgres.admin.clone();
        Self { options: admin.clone().database(&name), admin, name }
    }

    /// Opens a connection beside those of the server.
    pub async fn connect(&self) -> PgConnection {
        self.options.connect().await.expect("the database accepts connections")
    }

    /// Returns the URL for a server in its own process.
    pub fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }
}

impl Drop for TestDatabase {
    /// Does not wait, because it runs on the runtime of the test, whose connections must close
    /// first.
    fn drop(&mut self) {
        let drop = format!("drop database {} with (force)", self.name);
        let result = database_dropper().send((self.admin.clone(), drop));
        result.expect("the thread ends with the process");
    }
}

/// Returns the queue of a thread that drops the databases of finished tests. Databases that
/// are left when the process exits are removed with the PostgreSQL or by a later run.
fn database_dropper() -> &'static Sender<(PgConnectOptions, String)> {
    static DROPPER: LazyLock<Sender<(PgConnectOptions, String)>> = LazyLock::new(|| {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime");
            for (admin, statement) in receiver {
                runtime.block_on(execute(&admin, statement));
            }
        });
        sender
    });
    &DROPPER
}

/// The age from which a database belongs to a run that has ended.
const STALE_DATABASE_AGE: Duration = Duration::from_mins(30);

/// Drops the databases that earlier runs left behind.
async fn drop_stale_databases(admin: &PgConnectOptions) {
    let mut connection = admin.connect().await.expect("PostgreSQL accepts connections");
    let names = "select datname::text from pg_database where datname like 'test\\_%'";
    let names: Vec<String> =
        sqlx::query_scalar(names).fetch_all(&mut connection).await.expect("listed");
    let is_stale = |name: &&String| {
        let id = name.strip_prefix("test_").and_then(|id| id.parse::<Uuid>().ok());
        let created = id.and_then(|id| id.get_timestamp()).map(|timestamp| timestamp.to_unix().0);
        let created = created.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        created
            .and_then(|created| created.elapsed().ok())
            .is_some_and(|age| age > STALE_DATABASE_AGE)
    };
    for name in names.iter().filter(is_stale) {
        execute(admin, format!("drop database if exists {name} with (force)")).await;
    }
}

impl Postgres {
    async fn start() -> Self {
        let (admin, embedded) = if let Ok(url) = env::var("TEST_DATABASE_URL") {
            print_line("tests run on the PostgreSQL of TEST_DATABASE_URL");
            (PgConnectOptions::from_str(&url).expect("TEST_DATABASE_URL is a valid URL"), None)
        } else if let Some(container) = lease_container().await {
            print_line(&format!("tests run on PostgreSQL in the container {}", container.id));
            (container.options, None)
        } else {
            print_line("tests run on an embedded PostgreSQL");
            let (url, child) = start_embedded();
            (PgConnectOptions::from_str(&url).expect("a valid URL"), Some(child))
        };
        drop_stale_databases(&admin).await;
        let template = create_template(&admin).await;
        Self { admin, template, _embedded: embedded }
    }
}

async fn lease_container() -> Option<Container> {
    if container::is_available().await { container::start().await } else { None }
}

/// Prints a line even if the test passes. The harness captures the output of the print
/// macros.
pub fn print_line(line: &str) {
    writeln!(io::stderr(), "{line}").expect("written");
}

fn start_embedded() -> (String, Child) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_fast-zero"))
        .args(["postgres", "--temporary", "--lifeline"])
        .env("RUST_LOG", "warn")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut url = String::new();
    let stdout = child.stdout.take().expect("piped");
    BufReader::new(stdout).read_line(&mut url).expect("a line");
    assert!(!url.is_empty(), "the embedded PostgreSQL did not start: its messages are above");
    (url.trim().to_owned(), child)
}

/// Creates the template, unless an earlier run has. Its name depends on the migrations.
async fn create_template(admin: &PgConnectOptions) -> String {
    let checksums = MIGRATIONS.iter().flat_map(|migration| migration.checksum.iter());
    let digest = checksums.fold(0_u64, |digest, byte| {
        digest.wrapping_mul(1_099_511_628_211).wrapping_add(u64::from(*byte))
    });
    let name = format!("fast_zero_template_{digest:x}");

    let mut connection = admin.connect().await.expect("PostgreSQL accepts connections");
    // Another run may create the template at the same time.
    let lock = "select pg_advisory_lock(hashtext($1))";
    sqlx::query(lock).bind(&name).execute(&mut connection).await.expect("locked");
    let exists = "select exists (select from pg_database where datname = $1)";
    let exists: bool =
        sqlx::query_scalar(exists).bind(&name).fetch_one(&mut connection).await.expect("counted");
    if !exists {
        let temporary = format!("{name}_{}", Uuid::now_v7().simple());
        let create = format!("create database {temporary} template template0 encoding 'UTF8'");
        execute(admin, create).await;
        let mut database = admin
            .clone()
            .database(&temporary)
            .connect()
            .await
            .expect("the database accepts connections");
        MIGRATIONS.run(&mut database).await.expect("migrated");
        database.close().await.expect("closed");
        execute(admin, format!("alter database {temporary} rename to {name}")).await;
    }
    name
}

async fn execute(admin: &PgConnectOptions, statement: String) {
    let mut connection = admin.connect().await.expect("PostgreSQL accepts connections");
    let result = sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await;
    result.expect("the statement is valid");
}
