//! A PostgreSQL in a container that is removed when the run ends, even if it is killed.
//!
//! The test harness has no hook at the end of a run and never drops statics, and a killed
//! process runs no code. So the container stops by itself: the test process holds a lock on a
//! connection (the lease), and the container waits for that lock.

use std::{future, mem, str::FromStr, thread, time::Duration};

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

/// The same options as those of the embedded PostgreSQL.
const INITDB: &str = "--encoding=UTF8 --locale-provider=builtin --builtin-locale=C.UTF-8 \
                      --locale=C --set=scram_iterations=1 --no-sync";
/// The same settings as those of a temporary embedded PostgreSQL.
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

/// The timeout for an engine that may be on an unreachable machine.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(5);

/// Acquires the lock before it creates the table, so that the lock is held when the table is
/// visible.
const LEASE: &str = "select pg_advisory_lock(1); create table lease as select 1";
/// A script that the image runs after `initdb`, before the server listens on TCP. It stays in
/// the background and polls for the lease, for about half a minute in case the test process
/// ends before. Then it waits for the lock, and stops PostgreSQL immediately, because nothing
/// needs the data.
const WATCH: &str = "#!/bin/sh
{
    for _ in $(seq 200); do
        psql -h 127.0.0.1 -d postgres -c 'select pg_advisory_lock(1) from lease' && break
        sleep 0.1
    done
    kill -QUIT 1
} </dev/null >/dev/null 2>&1 &
";

/// A container that runs until this process exits.
pub struct Container {
    pub id: String,
    pub options: PgConnectOptions,
}

/// Returns `true` if a Docker engine is available and has the image. The tests pull none.
pub async fn is_available() -> bool {
    let image = format!("{IMAGE}:{TAG}");
    let has_image = async { docker_client_instance().await.ok()?.inspect_image(&image).await.ok() };
    timeout(ENGINE_TIMEOUT, has_image).await.is_ok_and(|image| image.is_some())
}

/// Returns `true` if the container exists.
pub async fn exists(id: &str) -> bool {
    let engine = docker_client_instance().await.expect("an engine");
    match engine.inspect_container(id, None).await {
        Ok(_) => true,
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => false,
        Err(error) => panic!("cannot inspect the container: {error}"),
    }
}

/// Starts a container. A thread of its own holds the lease, because a connection closes with
/// its runtime, and every test has its own runtime.
///
/// Returns `None` if the container does not start. The thread prints the cause.
pub async fn start() -> Option<Container> {
    let (sender, receiver) = oneshot::channel();
    thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let container = run_container().await;
            let mut lease =
                container.options.connect().await.expect("PostgreSQL accepts connections");
            sqlx::raw_sql(LEASE).execute(&mut lease).await.expect("the lease");
            let _ = sender.send(container);
            future::pending::<()>().await;
        });
    });
    receiver.await.ok()
}

async fn run_container() -> Container {
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
    // Dropping the value would remove the container and block the thread.
    mem::forget(container);
    Container { id, options: PgConnectOptions::from_str(&url).expect("a valid URL") }
}
