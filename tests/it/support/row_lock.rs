//! Locks that a test holds, so that calls have to wait for them.

use sqlx::PgConnection;
use uuid::Uuid;

use super::{App, wait::wait_until};

/// A transaction that holds its locks until it is released or dropped.
pub struct RowLock(PgConnection);

impl App {
    /// Locks the row of a todo.
    pub async fn lock_todo(&self, id: &str) -> RowLock {
        let mut connection = self.connect_database().await;
        sqlx::raw_sql("begin").execute(&mut connection).await.expect("a transaction");
        let lock = sqlx::query("select from todos where id = $1 for update");
        let id = Uuid::parse_str(id).expect("a UUID");
        lock.bind(id).fetch_one(&mut connection).await.expect("the todo exists");
        RowLock(connection)
    }

    /// Runs a statement in a transaction of its own, which holds its locks and hides its
    /// changes until it is released.
    pub async fn hold_lock(&self, statement: &'static str) -> RowLock {
        RowLock::acquire(self.connect_database().await, statement).await
    }
}

impl App {
    /// Makes each statement that inserts a session wait until the lock is released.
    pub async fn hold_session_inserts(&self) -> RowLock {
        self.execute(
            "create function wait() returns trigger language plpgsql as
                 'begin perform pg_advisory_xact_lock(1); return new; end';
             create trigger wait before insert on sessions for each row execute function wait()",
        )
        .await;
        self.hold_lock("select pg_advisory_xact_lock(1)").await
    }
}

impl RowLock {
    /// Does the same as [`App::hold_lock`], on this connection.
    pub async fn acquire(mut connection: PgConnection, statement: &'static str) -> Self {
        sqlx::raw_sql("begin").execute(&mut connection).await.expect("a transaction");
        let result = sqlx::raw_sql(statement).execute(&mut connection).await;
        result.expect("the statement is valid");
        Self(connection)
    }

    /// Waits until another statement waits for this transaction.
    pub async fn wait_until_blocking(&mut self) {
        let is_blocking = "select exists (
            select from pg_locks where not granted and pg_backend_pid() = any(pg_blocking_pids(pid))
        )";
        wait_until("a statement waits for the lock", async || {
            sqlx::query_scalar(is_blocking).fetch_one(&mut self.0).await.expect("a row")
        })
        .await;
    }

    /// Waits until exactly `count` statements wait, for this lock or for each other.
    pub async fn wait_until_blocked_by(&mut self, count: i64) {
        // Not pg_stat_activity, which does not change during a transaction.
        let waiting = "select count(distinct pid) from pg_locks where not granted and pid in (
            select pid from pg_locks join pg_database on pg_database.oid = database
            where datname = current_database()
        )";
        wait_until("the expected number of statements wait", async || {
            let waiting = sqlx::query_scalar(waiting).fetch_one(&mut self.0);
            let waiting: i64 = waiting.await.expect("a row");
            assert!(waiting <= count, "{waiting} statements wait");
            waiting == count
        })
        .await;
    }

    pub async fn release(mut self) {
        sqlx::raw_sql("commit").execute(&mut self.0).await.expect("committed");
    }
}
