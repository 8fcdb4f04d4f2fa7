//! A database whose clock is wrong. Servers follow the clock of their database.

use sqlx::PgConnection;
use time::{Duration, OffsetDateTime, Time};

use super::postgres::TestDatabase;

/// Replaces the function by which servers read the clock: the search path finds it before that of
/// PostgreSQL.
const SHADOW: &str = "
    create table clock_offset (seconds bigint not null);
    insert into clock_offset values (0);
    create function clock_timestamp() returns timestamptz language sql volatile as $$
        select pg_catalog.clock_timestamp() + make_interval(secs => seconds)
        from public.clock_offset
    $$;
    do $$ begin
        execute format(
            'alter database %I set search_path = public, pg_catalog', current_database()
        );
    end $$;";

/// The clock of a database, which starts shortly before the end of the month (UTC).
pub struct MonthEndClock {
    connection: PgConnection,
    until_end: Duration,
}

impl MonthEndClock {
    /// Replaces the clock of a database that no server uses yet.
    pub async fn new(database: &TestDatabase) -> Self {
        let mut connection = database.connect().await;
        sqlx::raw_sql(SHADOW).execute(&mut connection).await.expect("replaced");
        let now = OffsetDateTime::now_utc();
        let next = now.replace_day(28).expect("in each month") + Duration::days(4);
        let end = next.replace_day(1).expect("in each month").replace_time(Time::MIDNIGHT);
        Self { connection, until_end: end - now }
    }

    /// Sets the clock to this many seconds after the end of the month.
    pub async fn set(&mut self, seconds_after_end: i64) {
        let seconds = self.until_end.whole_seconds() + seconds_after_end;
        let update = sqlx::query("update clock_offset set seconds = $1").bind(seconds);
        update.execute(&mut self.connection).await.expect("set");
    }
}
