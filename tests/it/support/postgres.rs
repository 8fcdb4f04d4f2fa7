//! The PostgreSQL that the tests run on: from `TEST_DATABASE_URL`, or in a container where
//! an engine has the image, or a private one. The latter two end with the run, however it
//! ends.

use std::{
    env,
    io::{self, BufRead, BufReader, Write},
    process::{Child, Command, Stdio},
    sync::{
        LazyLock,
        mpsc::{self, Sender},
    },
    thread,
    time::{Duration, UNIX_EPOCH},
};

use fast_zero::database::{self, MIGRATIONS};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};
use tokio::sync::OnceCell;
use uuid::Uuid;

use super::container::{self, Container};

/// One PostgreSQL for the run.
struct Postgres {
    admin: PgConnectOptions,
    /// Migrated once; every test's database is a copy of it.
    template: String,
    /// Its standard input is the lifeline of the private PostgreSQL, which ends when
    /// this process does.
    _private: Option<Child>,
}

static POSTGRES: OnceCell<Postgres> = OnceCell::const_new();

/// A database of one test, dropped with it.
#[derive(Debug)]
pub struct TestDatabase {
    pub options: PgConnectOptions,
    admin: PgConnectOptions,
    name: String,
}

impl TestDatabase {
    /// A migrated database without any rows.
    pub async fn create() -> Self {
        let postgres = POSTGRES.get_or_init(Postgres::start).await;
        Self::create_as(postgres, &format!("template {}", postgres.template)).await
    }

    /// A database without tables; `options` as in CREATE DATABASE.
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

    /// A connection beside those of the server.
    pub async fn connect(&self) -> PgConnection {
        self.options.connect().await.expect("the test's database answers")
    }

    /// The URL for a server in a process of its own.
    pub fn url(&self) -> String {
        self.options.to_url_lossy().to_string()
    }
}

impl Drop for TestDatabase {
    /// Does not wait: the connections of this test end with its runtime, on which this
    /// runs.
    fn drop(&mut self) {
        let drop = format!("drop database {} with (force)", self.name);
        let sent = janitor().send((self.admin.clone(), drop));
        sent.expect("the janitor ends with the process");
    }
}

/// Drops the databases of tests that have ended. Those that are left when the process
/// ends go with the private PostgreSQL, or are found by a later run.
fn janitor() -> &'static Sender<(PgConnectOptions, String)> {
    static JANITOR: LazyLock<Sender<(PgConnectOptions, String)>> = LazyLock::new(|| {
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
    &JANITOR
}

/// For how long another run may need a database that it made.
const LEFT_BEHIND_AFTER: Duration = Duration::from_mins(30);

/// Drops what earlier runs left behind.
async fn drop_leftovers(admin: &PgConnectOptions) {
    let mut connection = admin.connect().await.expect("PostgreSQL answers");
    let names = "select datname::text from pg_database where datname like 'test\\_%'";
    let names: Vec<String> =
        sqlx::query_scalar(names).fetch_all(&mut connection).await.expect("listed");
    let is_left_behind = |name: &&String| {
        let id = name.strip_prefix("test_").and_then(|id| id.parse::<Uuid>().ok());
        let made = id.and_then(|id| id.get_timestamp()).map(|made| made.to_unix().0);
        let made = made.map(|made| UNIX_EPOCH + Duration::from_secs(made));
        made.and_then(|made| made.elapsed().ok()).is_some_and(|age| age > LEFT_BEHIND_AFTER)
    };
    for name in names.iter().filter(is_left_behind) {
        execute(admin, format!("drop database if exists {name} with (force)")).await;
    }
}

impl Postgres {
    async fn start() -> Self {
        let (admin, private) = if let Ok(url) = env::var("TEST_DATABASE_URL") {
            tell("tests run on the PostgreSQL of TEST_DATABASE_URL");
            (database::parse_url(&url).expect("TEST_DATABASE_URL is a URL"), None)
        } else if let Some(container) = leased_container().await {
            tell(&format!("tests run on PostgreSQL in the container {}", container.id));
            (container.options, None)
        } else {
            tell("tests run on a private PostgreSQL");
            let (url, child) = start_private();
            (database::parse_url(&url).expect("it prints its URL"), Some(child))
        };
        drop_leftovers(&admin).await;
        let template = create_template(&admin).await;
        Self { admin, template, _private: private }
    }
}

async fn leased_container() -> Option<Container> {
    if container::is_possible().await { container::start().await } else { None }
}

/// Writes a line that is seen: the harness keeps what a test prints by the macros to
/// itself if the test passes.
pub fn tell(line: &str) {
    writeln!(io::stderr(), "{line}").expect("written");
}

fn start_private() -> (String, Child) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_fast-zero"))
        .args(["postgres", "--temporary", "--lifeline"])
        .env("RUST_LOG", "warn")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut url = String::new();
    let stdout = child.stdout.take().expect("it is piped");
    BufReader::new(stdout).read_line(&mut url).expect("it prints its URL");
    assert!(!url.is_empty(), "the private PostgreSQL did not start: its messages are above");
    (url.trim().to_owned(), child)
}

/// Named after the migrations, so that runs on a PostgreSQL that stays share it.
async fn create_template(admin: &PgConnectOptions) -> String {
    let checksums = MIGRATIONS.iter().flat_map(|migration| migration.checksum.iter());
    let digest = checksums.fold(0_u64, |digest, byte| {
        digest.wrapping_mul(1_099_511_628_211).wrapping_add(u64::from(*byte))
    });
    let name = format!("fast_zero_template_{digest:x}");

    let mut connection = admin.connect().await.expect("PostgreSQL answers");
    // Another run may be creating it.
    let lock = "select pg_advisory_lock(hashtext($1))";
    sqlx::query(lock).bind(&name).execute(&mut connection).await.expect("locked");
    let exists = "select exists (select from pg_database where datname = $1)";
    let exists: bool =
        sqlx::query_scalar(exists).bind(&name).fetch_one(&mut connection).await.expect("counted");
    if !exists {
        let making = format!("{name}_{}", Uuid::now_v7().simple());
        let create = format!("create database {making} template template0 encoding 'UTF8'");
        execute(admin, create).await;
        let mut database = admin.clone().database(&making).connect().await.expect("it is there");
        MIGRATIONS.run(&mut database).await.expect("migrated");
        database.close().await.expect("closed");
        execute(admin, format!("alter database {making} rename to {name}")).await;
    }
    name
}

async fn execute(admin: &PgConnectOptions, statement: String) {
    let mut connection = admin.connect().await.expect("PostgreSQL answers");
    let done = sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await;
    done.expect("the statement works");
}
