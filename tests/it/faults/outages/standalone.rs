//! Outages of a whole PostgreSQL, with the real binary.

use sqlx::{Connection, PgConnection};

use super::probe::OutageProbe;
use crate::support::{
    embedded::{Postgres, temp_dir},
    process::{Binary, Process},
};

async fn start(postgres: &Postgres) -> (Process, OutageProbe) {
    let server = Binary::server(&postgres.url).start();
    let address = server.address().await.parse().expect("an address");
    let probe = OutageProbe::start(address, &postgres.options()).await;
    (server, probe)
}

#[tokio::test]
async fn a_suspended_postgresql_fails_calls_in_time() {
    let postgres = Postgres::temporary();
    let (server, mut probe) = start(&postgres).await;
    let frozen = postgres.freeze().await;
    probe.assert_unavailable_during_outage().await;
    drop(frozen);
    probe.assert_recovery().await;
    assert!(!server.output().contains("internal error"), "{}", server.output());
}

#[tokio::test]
async fn a_postgresql_without_free_connections_is_unavailable() {
    let dir = temp_dir();
    let postgres = Postgres::start(&dir.path().join("data"));
    let (server, mut probe) = start(&postgres).await;
    let mut connections = vec![postgres.connect().await];
    take_all_connections(&postgres, &mut connections).await;
    while terminate_service_connections(&mut connections[0]).await {
        take_all_connections(&postgres, &mut connections).await;
    }
    probe.assert_unavailable_during_outage().await;
    assert!(server.output().contains("too many clients"), "{}", server.output());
    for connection in connections {
        connection.close().await.expect("closed");
    }
    probe.assert_recovery().await;
    assert!(!server.output().contains("internal error"), "{}", server.output());
}

/// Opens connections until PostgreSQL rejects one.
async fn take_all_connections(postgres: &Postgres, connections: &mut Vec<PgConnection>) {
    const TOO_MANY_CONNECTIONS: &str = "53300";
    let rejected = loop {
        match PgConnection::connect_with(&postgres.options()).await {
            Ok(connection) => connections.push(connection),
            Err(rejected) => break rejected,
        }
    };
    let rejected = rejected.into_database_error().expect("an error of PostgreSQL");
    assert_eq!(rejected.code().as_deref(), Some(TOO_MANY_CONNECTIONS), "{rejected}");
}

/// Terminates the connections of the service. Returns `true` if there were any.
async fn terminate_service_connections(sql: &mut PgConnection) -> bool {
    let end = "select count(pg_terminate_backend(pid, 1000)) from pg_stat_activity
        where application_name = 'fast-zero'";
    let ended: i64 = sqlx::query_scalar(end).fetch_one(sql).await.expect("ended");
    ended > 0
}
