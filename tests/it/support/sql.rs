//! What tests do and see in the database, behind the server's back.

use sqlx::{Postgres, Type, decode::Decode};

use super::App;

impl App {
    /// Runs statements.
    pub async fn execute(&self, statements: &'static str) {
        let done = sqlx::raw_sql(statements).execute(&mut self.sql().await).await;
        done.expect("the statements work");
    }

    /// Asks for one value.
    pub async fn select<T>(&self, statement: &'static str) -> T
    where
        T: for<'a> Decode<'a, Postgres> + Type<Postgres> + Send + Unpin,
    {
        let value = sqlx::query_scalar(statement).fetch_one(&mut self.sql().await).await;
        value.expect("the statement has a value")
    }
}
