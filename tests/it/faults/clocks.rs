//! Replicas whose system clocks differ.

use std::time::{Duration, SystemTime};

use crate::support::{
    Client,
    app::connect,
    assert::assert_unauthenticated,
    postgres::TestDatabase,
    process::{Binary, Process},
    system_clock::ClockError,
    time::{assert_recent, to_system_time, uuid_timestamp},
};

/// More than the grace period of refresh tokens and the leeway of access tokens, in seconds.
const CLOCK_ERROR: i64 = 15;

/// A replica and a client of it.
async fn start(database: &TestDatabase, clock_error: &ClockError) -> (Process, Client) {
    let replica = Binary::server(&database.url()).with_clock_error(clock_error).start();
    let address = replica.address().await.parse().expect("an address");
    (replica, Client::new(connect(address).await))
}

#[tokio::test]
async fn replicas_with_different_clocks_agree_about_sessions() {
    let database = TestDatabase::create().await;
    let errors = (ClockError::of(CLOCK_ERROR), ClockError::of(-CLOCK_ERROR));
    let (ahead, at_ahead) = start(&database, &errors.0).await;
    let (behind, at_behind) = start(&database, &errors.1).await;
    for (name, one, other) in [("ana", &at_behind, &at_ahead), ("bob", &at_ahead, &at_behind)] {
        let user = one.signed_up(name).await;
        let old = user.tokens().refresh_token.clone();
        let new = one.refresh(&old).await;
        // A client repeats a refresh whose response it did not get.
        assert_eq!(other.refresh(&old).await.refresh_token, new.refresh_token);
        let next = other.refresh(&new.refresh_token).await;
        assert_eq!(one.refresh(&new.refresh_token).await.refresh_token, next.refresh_token);
        for client in [one, other] {
            let client = client.clone().with_token(&next.access_token);
            assert_eq!(client.list_sessions().await.len(), 1);
            assert!(client.is_session_active().await);
        }
    }
    for replica in [ahead, behind] {
        replica.wait_for_line("system clock differs from the clock of the database").await;
    }
}

#[tokio::test]
async fn a_server_with_another_clock_uses_the_clock_of_the_database() {
    for clock_error in [CLOCK_ERROR, -CLOCK_ERROR] {
        let database = TestDatabase::create().await;
        let clock_error = ClockError::of(clock_error);
        let (_replica, client) = start(&database, &clock_error).await;
        let started = SystemTime::now();
        let ana = client.signed_up("ana").await;
        let (user, tokens) = (ana.get_user("me").await, ana.tokens());
        let todo = ana.create_todo("A").await;
        for time in [
            user.create_time,
            user.update_time,
            todo.create_time,
            todo.update_time,
            Some(uuid_timestamp(&tokens.session_id)),
        ] {
            assert_recent(started, Duration::ZERO, time);
        }
        assert!(to_system_time(todo.update_time) >= to_system_time(todo.create_time));
        assert_recent(started, Duration::from_mins(30), tokens.access_token_expire_time);

        client.refresh(&tokens.refresh_token).await;
        sqlx::query("update sessions set rotated_at = rotated_at - interval '10 seconds'")
            .execute(&mut database.connect().await)
            .await
            .expect("updated");
        assert_unauthenticated(
            client.try_refresh(&tokens.refresh_token).await,
            "REFRESH_TOKEN_REUSED",
        );
    }
}

#[tokio::test]
async fn a_step_of_the_system_clock_changes_nothing() {
    let database = TestDatabase::create().await;
    let clock_error = ClockError::of(0);
    let (replica, client) = start(&database, &clock_error).await;
    let ana = client.signed_up("ana").await;
    let old = &ana.tokens().refresh_token;
    let new = client.refresh(old).await;
    // More than the lifetime of the access token.
    clock_error.set(3_600);
    assert!(ana.is_session_active().await);
    assert_eq!(client.refresh(old).await.refresh_token, new.refresh_token);
    replica.wait_for_line("system clock differs from the clock of the database").await;
    assert!(ana.is_session_active().await);
    assert_eq!(client.refresh(old).await.refresh_token, new.refresh_token);
}
