//! Refresh tokens: rotation, and reuse detection, which revokes the session.

use std::time::{Duration, SystemTime};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use fast_zero::proto::auth::v1::LogoutScope;

use crate::support::{
    App, Client, PASSWORD,
    app::{SECRET_KEY, config_with, connect},
    assert::{assert_invalid, assert_unauthenticated},
    parallel::join_all,
    postgres::TestDatabase,
    process::Binary,
    time::{assert_recent, to_system_time},
    wait::wait_until,
};

const GENERATION: &str = "select generation from sessions";
const DAYS_30: Duration = Duration::from_hours(30 * 24);

#[tokio::test]
async fn a_refresh_returns_new_tokens_of_the_same_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.tokens();
    let started = SystemTime::now();
    let new = app.anonymous().refresh(&old.refresh_token).await;
    assert_ne!(new.refresh_token, old.refresh_token);
    assert_ne!(new.access_token, old.access_token);
    assert_eq!((&new.session_id, &*new.token_type), (&old.session_id, "Bearer"));
    assert_recent(started, Duration::from_mins(30), new.access_token_expire_time);
    assert_recent(started, DAYS_30, new.refresh_token_expire_time);
    for token in [&old.access_token, &new.access_token] {
        assert!(ana.clone().with_token(token).is_session_active().await);
    }
    let next = app.anonymous().refresh(&new.refresh_token).await;
    assert!(![&new.refresh_token, &old.refresh_token].contains(&&next.refresh_token));
    assert_eq!(ana.list_sessions().await.len(), 1);
}

#[tokio::test]
async fn a_refresh_updates_the_times_of_the_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "update sessions set rotated_at = rotated_at - interval '1 day',
             expires_at = expires_at - interval '1 day'",
    )
    .await;
    let before = ana.list_sessions().await.remove(0);
    let started = SystemTime::now();
    let tokens = ana.refresh(&ana.tokens().refresh_token).await;
    let after = ana.list_sessions().await.remove(0);
    assert!(to_system_time(before.last_used_time) < started - Duration::from_hours(23));
    assert_recent(started, Duration::ZERO, after.last_used_time);
    assert_recent(started, DAYS_30, after.expire_time);
    assert_eq!(after.expire_time, tokens.refresh_token_expire_time);
    assert_eq!((after.id, after.create_time), (before.id, before.create_time));
}

#[tokio::test]
async fn the_previous_refresh_token_returns_the_same_successor_for_ten_seconds() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let new = ana.refresh(&ana.tokens().refresh_token).await;
    for _ in 0..3 {
        let again = ana.refresh(&ana.tokens().refresh_token).await;
        assert_eq!(again.refresh_token, new.refresh_token);
        assert_eq!(again.refresh_token_expire_time, new.refresh_token_expire_time);
        assert!(ana.clone().with_token(&again.access_token).is_session_active().await);
    }
    app.execute("update sessions set rotated_at = rotated_at - interval '7 s'").await;
    let again = ana.refresh(&ana.tokens().refresh_token).await;
    assert_eq!(again.refresh_token, new.refresh_token);
    assert_eq!(app.fetch_scalar::<i32>(GENERATION).await, 1);
    let next = ana.refresh(&new.refresh_token).await;
    assert_ne!(next.refresh_token, new.refresh_token);
}

/// Asserts that the reuse of the token is detected and revokes its session only.
async fn assert_reuse_ends_session(app: &App, session: &Client, used: &str, newest: &str) {
    let other = app.logged_in("ana").await;
    assert!(session.is_session_active().await);
    assert_unauthenticated(app.anonymous().try_refresh(used).await, "REFRESH_TOKEN_REUSED");
    assert!(!session.is_session_active().await);
    for token in [newest, used] {
        let rejected = app.anonymous().try_refresh(token).await;
        assert_unauthenticated(rejected, "REFRESH_TOKEN_INVALID");
    }
    assert!(other.is_session_active().await);
    other.refresh(&other.tokens().refresh_token).await;
}

#[tokio::test]
async fn reuse_of_the_previous_refresh_token_after_ten_seconds_revokes_the_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let used = &ana.tokens().refresh_token;
    let newest = ana.refresh(used).await.refresh_token;
    app.execute("update sessions set rotated_at = rotated_at - interval '10 s'").await;
    assert_reuse_ends_session(&app, &ana, used, &newest).await;
}

#[tokio::test]
async fn reuse_of_an_older_refresh_token_revokes_the_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let used = &ana.tokens().refresh_token;
    let mut newest = ana.refresh(used).await;
    for _ in 0..2 {
        newest = ana.refresh(&newest.refresh_token).await;
    }
    let session = ana.clone().with_token(&newest.access_token);
    assert_reuse_ends_session(&app, &session, used, &newest.refresh_token).await;
}

#[tokio::test]
async fn refresh_token_reuse_is_logged_as_a_warning_without_the_token() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let channel = connect(server.address().await.parse().expect("an address"));
    let anonymous = Client::new(channel.await);
    anonymous.sign_up("ana", "ana@example.com", PASSWORD).await;
    let ana = anonymous.logged_in("ana", PASSWORD).await.expect("logged in");
    let used = &ana.tokens().refresh_token;
    let next = ana.refresh(used).await;
    ana.refresh(&next.refresh_token).await;
    let reusing = anonymous.with_metadata("x-request-id", "the-reuse").try_refresh(used).await;
    assert_unauthenticated(reusing, "REFRESH_TOKEN_REUSED");
    let warning = server.wait_for_line("\"WARN\"").await;
    assert!(warning.contains("the-reuse"), "{warning}");
    for secret in [used, &next.refresh_token, &ana.tokens().access_token, &next.access_token] {
        assert!(!server.output().contains(&**secret));
    }
}

#[tokio::test]
async fn an_invalid_refresh_token_revokes_nothing() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (valid, bobs) = (&ana.tokens().refresh_token, &bob.tokens().refresh_token);
    // After a second rotation, the first token would revoke the session.
    let next = ana.refresh(valid).await;
    let newest = ana.refresh(&next.refresh_token).await.refresh_token;

    let replaced = |token: &str, at: usize| {
        let other = if &token[at..=at] == "A" { "B" } else { "A" };
        format!("{}{other}{}", &token[..at], &token[at + 1..])
    };
    let half = valid.len() / 2;
    let mut invalid = vec![
        "x".to_owned(),
        "garbage".to_owned(),
        "🦀".to_owned(),
        "\0".to_owned(),
        " ".to_owned(),
        "A".repeat(valid.len()),
        "A".repeat(100_000),
        valid[1..].to_owned(),
        valid[..valid.len() - 1].to_owned(),
        format!("{valid}A"),
        format!("{valid}{valid}"),
        URL_SAFE_NO_PAD.encode([0; 68]),
        format!("{}{}", &valid[..half], &bobs[half..]),
        format!("{}{}", &bobs[..half], &valid[half..]),
        ana.tokens().access_token.clone(),
    ];
    invalid.extend((0..valid.len()).map(|at| replaced(valid, at)));
    for token in invalid {
        let rejected = app.anonymous().try_refresh(&token).await;
        assert_unauthenticated(rejected, "REFRESH_TOKEN_INVALID");
    }
    assert_invalid(app.anonymous().try_refresh("").await, &["refresh_token"]);
    ana.refresh(&newest).await;
    bob.refresh(bobs).await;
}

#[tokio::test]
async fn an_expired_session_cannot_be_refreshed() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute("update sessions set expires_at = now() - interval '1 s'").await;
    let rejected = ana.try_refresh(&ana.tokens().refresh_token).await;
    assert_unauthenticated(rejected, "REFRESH_TOKEN_EXPIRED");
    assert!(!ana.is_session_active().await);
    assert_eq!(app.fetch_scalar::<i32>(GENERATION).await, 0);
}

#[tokio::test]
async fn a_refresh_before_expiry_keeps_the_session_active() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute("update sessions set expires_at = now() + interval '2 s'").await;
    let expired = SystemTime::now() + Duration::from_secs(2);
    assert!(ana.is_session_active().await, "the server knows now when the session expires");
    ana.refresh(&ana.tokens().refresh_token).await;
    wait_until("the first expiry passes", async || {
        assert!(ana.is_session_active().await);
        SystemTime::now() > expired + Duration::from_millis(100)
    })
    .await;
}

#[tokio::test]
async fn a_revoked_session_cannot_be_refreshed() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let next = ana.refresh(&ana.tokens().refresh_token).await;
    ana.log_out(LogoutScope::ThisSession).await;
    for token in [&next.refresh_token, &ana.tokens().refresh_token] {
        assert_unauthenticated(ana.try_refresh(token).await, "REFRESH_TOKEN_INVALID");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_64_concurrent_refreshes_rotates_and_all_return_its_successor() {
    let app = App::start().await;
    let (ana, replica) = (app.signed_up("ana").await, app.start_replica().await);
    let calls = (0..64).map(|n| {
        let ana = if n % 2 == 0 { ana.clone() } else { ana.clone().with_channel(&replica.channel) };
        async move { ana.refresh(&ana.tokens().refresh_token).await.refresh_token }
    });
    let mut successors = join_all(calls).await;
    successors.dedup();
    assert_eq!(successors.len(), 1);
    assert_eq!(app.fetch_scalar::<i32>(GENERATION).await, 1);
    ana.refresh(&successors[0]).await;
    assert_eq!(app.fetch_scalar::<i32>(GENERATION).await, 2);
}

#[tokio::test]
async fn the_previous_secret_key_verifies_tokens_until_it_is_removed() {
    const NEW_KEY: &str = "another secret that only the tests know";
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let server = async |previous: Option<&str>| {
        let config = config_with(|config| {
            config.tokens.secret_key = Some(NEW_KEY.into());
            config.tokens.secret_key_previous = previous.map(Into::into);
        });
        app.start_replica_with(config).await
    };
    let (both, new) = (server(Some(SECRET_KEY)).await, server(None).await);
    let old_tokens = ana.tokens();

    let unknown = ana.clone().with_channel(&new.channel);
    assert_unauthenticated(unknown.try_get_user("me").await, "TOKEN_INVALID");
    let rejected = unknown.try_refresh(&old_tokens.refresh_token).await;
    assert_unauthenticated(rejected, "REFRESH_TOKEN_INVALID");

    let known = ana.clone().with_channel(&both.channel);
    assert!(known.is_session_active().await);
    let tokens = known.refresh(&old_tokens.refresh_token).await;
    let header = |token: &str| jsonwebtoken::decode_header(token).expect("a JWT");
    assert_ne!(header(&tokens.access_token).kid, header(&old_tokens.access_token).kid);
    let refreshed = unknown.with_token(&tokens.access_token);
    assert!(refreshed.is_session_active().await);
    refreshed.refresh(&tokens.refresh_token).await;
    // A server without the new key rejects its tokens.
    let rejected = ana.clone().with_token(&tokens.access_token).try_get_user("me").await;
    assert_unauthenticated(rejected, "TOKEN_INVALID");
}
