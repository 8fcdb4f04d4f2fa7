//! A PostgreSQL in a container that is gone when the run is, however it ends.
//!
//! The harness of the tests has no hook at the end of a run and never drops a static, and
//! nothing of a process runs when it is killed. So the container ends by itself: this
//! process leases it by a lock on a connection, and the container waits for that lock.

use std::{future, mem, thread, time::Duration};

use fast_zero::database;
use sqlx::{ConnectOptions, postgres::PgConnectOptions};
use testcontainers_modules::{
    postgres,
    testcontainers::{
        CopyTargetOptions, ImageExt,
        bollard::errors::Error,
        core::{Mount, client::docker_client_instance},
        runners::AsyncRunner,
    },
};
use tokio::{runtime, sync::oneshot, time::timeout};
use uuid::Uuid;

const IMAGE: &str = "postgres";
const TAG: &str = "18";
/// `docker ps --filter label=fast-zero.tests` shows the containers of runs.
const LABEL: &str = "fast-zero.tests";

/// As the private PostgreSQL makes its data (`initdb` in `src/embedded/cluster.rs`).
const INITDB: &str = "--encoding=UTF8 --locale-provider=builtin --builtin-locale=C.UTF-8 \
                      --locale=C --set=scram_iterations=1 --no-sync";
/// As the private PostgreSQL runs where its data are thrown away
/// (`src/embedded/postmaster.rs`).
const SETTINGS: [&str; 9] = [
    "fsync=off",
    "full_page_writes=off",
    "synchronous_commit=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "max_wal_size=256MB",
    "max_connections=500",
    "shared_buffers=128MB",
    "io_method=sync",
];

/// How long to wait for an engine that may be on a machine that does not answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Takes the lock first: who sees the table finds the lock taken.
const LEASE: &str = "select pg_advisory_lock(1); create table lease as select 1";
/// The image runs it when it has made the data, before the server listens on TCP, and it
/// stays in the background. It asks until the lease is there, or for about half a minute,
/// in case this process ended before; then it waits for the lock. The data are not worth
/// an orderly shutdown.
const WATCH: &str = "#!/bin/sh
{
    for _ in $(seq 200); do
        psql -h 127.0.0.1 -d postgres -c 'select pg_advisory_lock(1) from lease' && break
        sleep 0.1
    done
    kill -QUIT 1
} </dev/null >/dev/null 2>&1 &
";

/// A container that runs until this process ends.
pub struct Container {
    pub id: String,
    pub options: PgConnectOptions,
}

/// Whether an engine answers that has the image; none is fetched for the tests.
pub async fn is_possible() -> bool {
    let image = format!("{IMAGE}:{TAG}");
    let has_image = async { docker_client_instance().await.ok()?.inspect_image(&image).await.ok() };
    timeout(ANSWER_LIMIT, has_image).await.is_ok_and(|image| image.is_some())
}

/// Whether the engine still has a container.
pub async fn exists(id: &str) -> bool {
    let engine = docker_client_instance().await.expect("the engine answers");
    match engine.inspect_container(id, None).await {
        Ok(_) => true,
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => false,
        Err(error) => panic!("the engine does not tell: {error}"),
    }
}

/// Starts a container. Its lease is on a thread of its own, because connections end with
/// the runtime that they were made on, and every test has another.
///
/// `None` if it does not start: the thread says why.
pub async fn start() -> Option<Container> {
    let (announce, announced) = oneshot::channel();
    thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let container = run().await;
            let mut lease = container.options.connect().await.expect("PostgreSQL answers");
            sqlx::raw_sql(LEASE).execute(&mut lease).await.expect("leased");
            let _ = announce.send(container);
            future::pending::<()>().await;
        });
    });
    announced.await.ok()
}

async fn run() -> Container {
    let password = Uuid::now_v7().simple().to_string();
    let container = postgres::Postgres::default()
        .with_password(&password)
        .with_name(IMAGE)
        .with_tag(TAG)
        .with_label(LABEL, "true")
        .with_env_var("POSTGRES_INITDB_ARGS", INITDB)
        .with_cmd(SETTINGS.iter().flat_map(|setting| ["-c", setting]))
        .with_mount(Mount::tmpfs_mount("/var/lib/postgresql"))
        .with_copy_to(
            CopyTargetOptions::new("/docker-entrypoint-initdb.d/watch.sh").with_mode(0o755),
            WATCH.as_bytes().to_vec(),
        )
        .with_host_config_modifier(|host| host.auto_remove = Some(true))
        .start()
        .await
        .expect("the container starts");
    let host = container.get_host().await.expect("the engine's host");
    let port = container.get_host_port_ipv4(5432).await.expect("a published port");
    let url = format!("postgresql://postgres:{password}@{host}:{port}/postgres?sslmode=disable");
    let id = container.id().to_owned();
    // Dropping it would remove the container, and would block the thread.
    mem::forget(container);
    Container { id, options: database::parse_url(&url).expect("a URL") }
}
