//! The binary, on a PostgreSQL of its own.

use sqlx::{Connection, PgConnection};

use super::trial::Trial;
use crate::support::{
    embedded::{Postgres, temp_dir},
    process::{Binary, Process},
};

async fn begin(postgres: &Postgres) -> (Process, Trial) {
    let server = Binary::server(&postgres.url).start();
    let address = server.address().await.parse().expect("an address");
    let trial = Trial::begin(address, &postgres.options()).await;
    (server, trial)
}

#[tokio::test]
async fn a_suspended_postgresql_fails_calls_in_time() {
    let postgres = Postgres::temporary();
    let (server, mut trial) = begin(&postgres).await;
    let frozen = postgres.freeze().await;
    trial.holds_while_it_is_away().await;
    drop(frozen);
    trial.holds_when_it_is_back().await;
    assert!(!server.output().contains("internal error"), "{}", server.output());
}

#[tokio::test]
async fn a_postgresql_without_free_connections_is_unavailable() {
    let dir = temp_dir();
    let postgres = Postgres::start(&dir.path().join("data"));
    let (server, mut trial) = begin(&postgres).await;
    let mut taken = vec![postgres.connect().await];
    take_all(&postgres, &mut taken).await;
    while end_those_of_the_service(&mut taken[0]).await {
        take_all(&postgres, &mut taken).await;
    }
    trial.holds_while_it_is_away().await;
    assert!(server.output().contains("too many clients"), "{}", server.output());
    for connection in taken {
        connection.close().await.expect("closed");
    }
    trial.holds_when_it_is_back().await;
    assert!(!server.output().contains("internal error"), "{}", server.output());
}

/// Takes connections until there are none.
async fn take_all(postgres: &Postgres, taken: &mut Vec<PgConnection>) {
    const TOO_MANY_CONNECTIONS: &str = "53300";
    let refused = loop {
        match PgConnection::connect_with(&postgres.options()).await {
            Ok(connection) => taken.push(connection),
            Err(refused) => break refused,
        }
    };
    let refused = refused.into_database_error().expect("PostgreSQL says so");
    assert_eq!(refused.code().as_deref(), Some(TOO_MANY_CONNECTIONS), "{refused}");
}

/// Whether there were any.
async fn end_those_of_the_service(sql: &mut PgConnection) -> bool {
    let end = "select count(pg_terminate_backend(pid, 1000)) from pg_stat_activity
        where application_name = 'fast-zero'";
    let ended: i64 = sqlx::query_scalar(end).fetch_one(sql).await.expect("ended");
    ended > 0
}
