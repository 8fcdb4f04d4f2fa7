//! Sessions: listing and revoking them.

use std::time::{Duration, Instant};

use fast_zero::proto::auth::v1::{LogoutScope, Session};
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    App, Client, PASSWORD,
    app::{config_with, unique_name},
    assert::{assert_invalid, assert_status},
    parallel::join_all,
    statements::statement_count,
    wait::wait_until,
};

const EXPIRE_ALL: &str = "update sessions set expires_at = now() - interval '1 s'";

fn ids(sessions: &[Session]) -> Vec<&str> {
    sessions.iter().map(|session| &*session.id).collect()
}

fn id(client: &Client) -> &str {
    &client.tokens().session_id
}

/// Returns which of the sessions are active.
async fn are_active<const N: usize>(sessions: [&Client; N]) -> [bool; N] {
    let mut active = [false; N];
    for (session, active) in sessions.into_iter().zip(&mut active) {
        *active = session.is_session_active().await;
    }
    active
}

#[tokio::test]
async fn the_callers_active_sessions_are_listed_newest_first() {
    let app = App::start().await;
    let first = app.signed_up("ana").await;
    app.signed_up("bob").await;
    let (second, third) = (app.logged_in("ana").await, app.logged_in("ana").await);
    for caller in [&first, &second, &third] {
        let sessions = caller.list_sessions().await;
        assert_eq!(ids(&sessions), [id(&third), id(&second), id(&first)]);
        let current: Vec<_> = sessions.into_iter().filter(|session| session.current).collect();
        assert_eq!(ids(&current), [id(caller)]);
    }

    // A refresh does not change the order.
    first.refresh(&first.tokens().refresh_token).await;
    assert_eq!(ids(&third.list_sessions().await), [id(&third), id(&second), id(&first)]);
    second.log_out(LogoutScope::ThisSession).await;
    app.execute(EXPIRE_ALL).await;
    let fourth = app.logged_in("ana").await;
    assert_eq!(ids(&fourth.list_sessions().await), [id(&fourth)]);
}

#[tokio::test]
async fn an_expired_session_is_not_listed_even_before_it_is_deleted() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let live = app.logged_in("ana").await;
    app.execute(
        "update sessions set expires_at = now() - interval '1 s'
         where id = (select id from sessions order by id limit 1)",
    )
    .await;
    assert_eq!(ids(&live.list_sessions().await), [id(&live)]);
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from sessions").await, 2);
    assert!(!ana.is_session_active().await);
}

#[tokio::test]
async fn the_callers_active_sessions_can_be_revoked() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let other = app.logged_in("ana").await;
    assert_eq!(are_active([&ana, &other]).await, [true, true]);
    ana.try_revoke_session(id(&other)).await.expect("revoked");
    assert_eq!(are_active([&ana, &other]).await, [true, false]);
    ana.try_revoke_session(id(&ana)).await.expect("revoked");
    assert_eq!(are_active([&ana, &other]).await, [false, false]);
}

#[tokio::test]
async fn no_other_session_can_be_revoked() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (revoked, expired) = (app.logged_in("ana").await, app.logged_in("ana").await);
    revoked.log_out(LogoutScope::ThisSession).await;
    app.execute(
        "update sessions set expires_at = now() - interval '1 s'
         where id = (select id from sessions order by id desc limit 1)",
    )
    .await;
    for other in [id(&bob), id(&revoked), id(&expired), &ana.user_id(), &Uuid::now_v7().to_string()]
    {
        let rejected = ana.try_revoke_session(other).await;
        let rejected = assert_status(rejected, Code::NotFound, "SESSION_NOT_FOUND");
        assert_eq!(rejected.message(), "Session not found");
    }
    let own = id(&ana);
    for invalid in
        ["", "me", "1", &own.to_uppercase(), &own.replace('-', ""), &format!("{{{own}}}"), "\0"]
    {
        assert_invalid(ana.try_revoke_session(invalid).await, &["session_id"]);
    }
    assert_eq!(are_active([&ana, &bob, &revoked, &expired]).await, [true, true, false, false]);
}

#[tokio::test]
async fn a_logout_revokes_the_sessions_of_its_scope() {
    for (scope, own, other) in [
        (LogoutScope::Unspecified, false, true),
        (LogoutScope::ThisSession, false, true),
        (LogoutScope::OtherSessions, true, false),
        (LogoutScope::AllSessions, false, false),
    ] {
        let app = App::start().await;
        let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
        let (second, third) = (app.logged_in("ana").await, app.logged_in("ana").await);
        let all = [&ana, &second, &third, &bob];
        assert_eq!(are_active(all).await, [true; 4]);
        ana.log_out(scope).await;
        assert_eq!(are_active(all).await, [own, other, other, true], "{scope:?}");
    }
}

#[tokio::test]
async fn an_unknown_logout_scope_revokes_nothing() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let other = app.logged_in("ana").await;
    for scope in [-1, 4, 99, i32::MIN, i32::MAX] {
        assert_invalid(ana.try_log_out(scope).await, &["scope"]);
    }
    assert_eq!(are_active([&ana, &other]).await, [true, true]);
}

#[tokio::test]
async fn another_replica_rejects_a_revoked_session_within_five_seconds() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    let sessions: Vec<_> = [
        app.logged_in("ana").await,
        app.logged_in("ana").await,
        app.logged_in("ana").await,
        app.signed_up("bob").await,
        app.signed_up("cid").await,
    ]
    .into();
    let there: Vec<_> =
        sessions.iter().map(|session| session.clone().with_channel(&replica.channel)).collect();
    for session in &there {
        assert!(session.is_session_active().await);
    }

    sessions[0].log_out(LogoutScope::ThisSession).await;
    ana.try_revoke_session(id(&sessions[1])).await.expect("revoked");
    ana.change_password(PASSWORD, "another password").await;
    sessions[3].log_out(LogoutScope::AllSessions).await;
    sessions[4].try_delete_user("me", "").await.expect("deleted");
    let ended = Instant::now();
    for session in &sessions {
        assert!(!session.is_session_active().await, "immediately on the replica that revoked it");
    }
    for session in &there {
        wait_until("the other replica rejects the session", async || {
            !session.is_session_active().await
        })
        .await;
    }
    assert!(ended.elapsed() < Duration::from_secs(6), "{:?}", ended.elapsed());
    assert!(ana.with_channel(&replica.channel).is_session_active().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_calls_of_an_uncached_session_share_one_lookup() {
    let app = App::start_with(config_with(|config| {
        config.limits.coalescing = false;
    }))
    .await;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold_lock("lock table sessions in access exclusive mode").await;
    let request_ids: Vec<_> = (0..16).map(|_| unique_name("lookup-")).collect();
    let calls = request_ids.iter().map(|request_id| {
        let ana = ana.clone().with_metadata("x-request-id", request_id);
        async move { ana.get_user("me").await }
    });
    let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
    lock.wait_until_blocked_by(1).await;
    lock.release().await;
    assert_eq!(calls.await.expect("no panic").len(), 16);
    let statements: usize = request_ids.iter().map(|request_id| statement_count(request_id)).sum();
    assert_eq!(statements, 17);
}
