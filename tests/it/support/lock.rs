//! A row that the test holds, so that calls have to wait for it.

use sqlx::PgConnection;
use uuid::Uuid;

use super::{App, wait::eventually};

/// Keeps what it locks until it is released or dropped.
pub struct RowLock(PgConnection);

impl App {
    pub async fn lock_todo(&self, id: &str) -> RowLock {
        let mut sql = self.sql().await;
        sqlx::raw_sql("begin").execute(&mut sql).await.expect("begun");
        let lock = sqlx::query("select from todos where id = $1 for update");
        let id = Uuid::parse_str(id).expect("an id");
        lock.bind(id).fetch_one(&mut sql).await.expect("locked");
        RowLock(sql)
    }

    /// Runs a statement in a transaction of its own, which keeps what it locks and
    /// hides what it changes until it is released.
    pub async fn hold(&self, statement: &'static str) -> RowLock {
        RowLock::hold(self.sql().await, statement).await
    }
}

impl RowLock {
    /// As [`App::hold`], on this connection.
    pub async fn hold(mut sql: PgConnection, statement: &'static str) -> Self {
        sqlx::raw_sql("begin").execute(&mut sql).await.expect("begun");
        sqlx::raw_sql(statement).execute(&mut sql).await.expect("the statement works");
        Self(sql)
    }

    /// Waits until somebody waits for the row.
    pub async fn until_awaited(&mut self) {
        let awaited = "select exists (
            select from pg_locks where not granted and pg_backend_pid() = any(pg_blocking_pids(pid))
        )";
        eventually("somebody waits for the row", async || {
            sqlx::query_scalar(awaited).fetch_one(&mut self.0).await.expect("looked")
        })
        .await;
    }

    /// Waits until exactly this many statements wait, for this lock or one another's.
    pub async fn until_queue_of(&mut self, count: i64) {
        // Not pg_stat_activity, which stays the same throughout a transaction.
        let waiting = "select count(distinct pid) from pg_locks where not granted and pid in (
            select pid from pg_locks join pg_database on pg_database.oid = database
            where datname = current_database()
        )";
        eventually("so many statements wait", async || {
            let waiting = sqlx::query_scalar(waiting).fetch_one(&mut self.0);
            let waiting: i64 = waiting.await.expect("counted");
            assert!(waiting <= count, "{waiting} statements wait");
            waiting == count
        })
        .await;
    }

    pub async fn release(mut self) {
        sqlx::raw_sql("commit").execute(&mut self.0).await.expect("committed");
    }
}
