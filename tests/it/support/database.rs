//! Statements that tests run directly in the database of the server.

use sqlx::{Postgres, Type, decode::Decode};

use super::App;

impl App {
    /// Runs statements.
    pub async fn execute(&self, statements: &'static str) {
        let result = sqlx::raw_sql(statements).execute(&mut self.connect_database().await).await;
        result.expect("the statements are valid");
    }

    /// Returns the first column of the first row.
    pub async fn fetch_scalar<T>(&self, statement: &'static str) -> T
    where
        T: for<'a> Decode<'a, Postgres> + Type<Postgres> + Send + Unpin,
    {
        let mut connection = self.connect_database().await;
        let value = sqlx::query_scalar(statement).fetch_one(&mut connection).await;
        value.expect("the statement returns a row")
    }
}
