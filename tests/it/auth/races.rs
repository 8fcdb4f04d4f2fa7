//! Concurrent logins and password changes.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use argon2::Params;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{
    App, Client, PASSWORD, RpcResult,
    app::config_with,
    assert::{assert_status, assert_unauthenticated},
    parallel::join_all,
    row_lock::RowLock,
    wait::wait_until,
};

const NEW_PASSWORD: &str = "a new password";
const SESSIONS: &str = "select count(*) from sessions";

/// Starts a password change and blocks it halfway: it holds the lock of the user's row and
/// waits for the row of a session to delete.
async fn start_password_change(app: &App, ana: &Client) -> (JoinHandle<()>, RowLock) {
    app.logged_in("ana").await;
    let newest = "select from sessions order by id desc limit 1 for update";
    let mut lock = app.hold_lock(newest).await;
    let ana = ana.clone();
    let change = tokio::spawn(async move { ana.change_password(PASSWORD, NEW_PASSWORD).await });
    lock.wait_until_blocked_by(1).await;
    (change, lock)
}

#[tokio::test]
async fn a_login_after_a_password_change_opens_no_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (change, mut lock) = start_password_change(&app, &ana).await;
    // The login reads the old password, because the change is not committed.
    let anonymous = app.anonymous();
    let login = tokio::spawn(async move { anonymous.try_log_in("ana", PASSWORD).await });
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    change.await.expect("changed");
    assert_unauthenticated(login.await.expect("no panic"), "INCORRECT_CREDENTIALS");
    assert_eq!(app.fetch_scalar::<i64>(SESSIONS).await, 1, "the session of the change");
    assert!(ana.is_session_active().await);
}

#[tokio::test]
async fn a_login_before_a_password_change_leaves_no_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold_session_inserts().await;
    let anonymous = app.anonymous();
    let login = tokio::spawn(async move { anonymous.logged_in("ana", PASSWORD).await });
    lock.wait_until_blocked_by(1).await;
    let change = tokio::spawn({
        let ana = ana.clone();
        async move { ana.change_password(PASSWORD, NEW_PASSWORD).await }
    });
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    change.await.expect("changed");
    // Whether the login succeeded or failed, its session is revoked.
    if let Ok(session) = login.await.expect("no panic") {
        assert!(!session.is_session_active().await);
        let rejected = session.try_refresh(&session.tokens().refresh_token).await;
        assert_unauthenticated(rejected, "REFRESH_TOKEN_INVALID");
    }
    assert_eq!(app.fetch_scalar::<i64>(SESSIONS).await, 1, "the session of the change");
    assert!(ana.is_session_active().await);
}

#[tokio::test]
async fn a_rehash_does_not_overwrite_a_concurrent_password_change() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let params = Params::new(64, 3, 1, Some(32)).expect("valid parameters");
    let replica = app
        .start_replica_with(config_with(|config| {
            config.tokens.argon2_params = params;
        }))
        .await;
    let (change, mut lock) = start_password_change(&app, &ana).await;
    let anonymous = app.anonymous().with_channel(&replica.channel);
    let login = tokio::spawn(async move { anonymous.try_log_in("ana", PASSWORD).await });
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    change.await.expect("changed");
    assert_unauthenticated(login.await.expect("no panic"), "INCORRECT_CREDENTIALS");
    let rejected = app.anonymous().try_log_in("ana", PASSWORD).await;
    assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
    app.anonymous().try_log_in("ana", NEW_PASSWORD).await.expect("logged in");
}

#[tokio::test]
async fn one_of_two_concurrent_password_changes_succeeds() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold_lock("select from users for update").await;
    let calls = ["the first password", "the other password"].map(|new| {
        let ana = ana.clone();
        async move { (new, ana.try_change_password(PASSWORD, new).await) }
    });
    let calls = tokio::spawn(join_all(calls));
    lock.wait_until_blocked_by(2).await;
    lock.release().await;
    let mut won = 0;
    for (new, response) in calls.await.expect("no panic") {
        let login = app.anonymous().try_log_in("ana", new).await;
        if response.is_ok() {
            won += 1;
            login.expect("logged in");
        } else {
            assert_unauthenticated(response, "INCORRECT_CREDENTIALS");
            assert_unauthenticated(login, "INCORRECT_CREDENTIALS");
        }
    }
    assert_eq!(won, 1);
    assert!(ana.is_session_active().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logins_beyond_the_queue_are_shed_while_other_calls_succeed() {
    // A hash takes about 25 ms, so a full queue takes half a second.
    let params = Params::DEFAULT;
    let settings = config_with(|config| {
        config.limits.hashing_threads = 1;
        config.tokens.argon2_params = params;
    });
    let app = App::start_with(settings).await;
    let ana = app.signed_up("ana").await;
    let answered = Arc::new(AtomicUsize::new(0));
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let (anonymous, answered) = (app.anonymous(), answered.clone());
            async move {
                let response = anonymous.try_log_in("ana", PASSWORD).await;
                answered.fetch_add(1, Ordering::Relaxed);
                response
            }
        })
        .collect();
    let logins = tokio::spawn(join_all(calls));
    wait_until("logins are shed", async || answered.load(Ordering::Relaxed) >= 100).await;
    ana.get_user("me").await;
    ana.create_todo("meanwhile").await;
    assert!(answered.load(Ordering::Relaxed) < 200, "logins still wait");

    let responses = logins.await.expect("no panic");
    assert!(responses.iter().any(Result::is_ok));
    // On a busy machine, a login in the queue may exceed its deadline.
    let late = |response: &RpcResult<_>| {
        response.as_ref().is_err_and(|s| s.code() == Code::DeadlineExceeded)
    };
    let rejected: Vec<_> =
        responses.into_iter().filter(|response| response.is_err() && !late(response)).collect();
    assert!(!rejected.is_empty());
    for rejected in rejected {
        let rejected = assert_status(rejected, Code::ResourceExhausted, "OVERLOADED");
        let details = rejected.get_error_details();
        let delay = details.retry_info().and_then(|retry| retry.retry_delay);
        assert!(delay.is_some_and(|delay| !delay.is_zero()), "{rejected:?}");
    }
    let login = async || app.anonymous().try_log_in("ana", PASSWORD).await;
    wait_until("logins are admitted again", async || login().await.is_ok()).await;
}
