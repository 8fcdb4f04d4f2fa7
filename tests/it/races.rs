//! What happens at the same moment.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use argon2::Params;
use fast_zero::{config::Config, password, proto::user::v1::User};
use tokio::task::JoinHandle;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{
    App, Client, PASSWORD,
    app::{config, keyring},
    assert::{assert_refused, assert_unauthenticated},
    lock::RowLock,
    parallel::at_once,
    todos::{Answer, titled},
    users::me,
    wait::eventually,
};

const NEW: &str = "a new password";
const SESSIONS: &str = "select count(*) from sessions";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_64_sign_ups_with_one_name_one_succeeds() {
    let app = App::start().await;
    let calls = (0..64).map(|n| {
        let (caller, username) = (app.anonymous(), if n % 2 == 0 { "ana" } else { "Ana" });
        async move { caller.try_sign_up(username, &format!("ana{n}@example.com"), PASSWORD).await }
    });
    let (succeeded, refused): (Vec<_>, Vec<_>) =
        at_once(calls).await.into_iter().partition(Result::is_ok);
    assert_eq!(succeeded.len(), 1);
    for refused in refused {
        let code = refused.as_ref().err().map(tonic::Status::code);
        if code == Some(Code::ResourceExhausted) {
            assert_refused(refused, Code::ResourceExhausted, "OVERLOADED");
        } else {
            assert_refused(refused, Code::AlreadyExists, "USERNAME_EXISTS");
        }
    }
    assert_eq!(app.select::<i64>("select count(*) from users").await, 1);
}

/// Begins to change the password, and stops it in the middle: it holds the user's row and
/// waits for a session that it is to end.
async fn changing(app: &App, ana: &Client) -> (JoinHandle<()>, RowLock) {
    app.logged_in("ana").await;
    let newest = "select from sessions order by id desc limit 1 for update";
    let mut lock = app.hold(newest).await;
    let ana = ana.clone();
    let change = tokio::spawn(async move { ana.change_password(PASSWORD, NEW).await });
    lock.until_queue_of(1).await;
    (change, lock)
}

#[tokio::test]
async fn a_login_that_comes_after_a_change_of_the_password_opens_no_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (change, mut lock) = changing(&app, &ana).await;
    // It reads the old password, since the change is not committed.
    let anonymous = app.anonymous();
    let login = tokio::spawn(async move { anonymous.try_log_in("ana", PASSWORD).await });
    lock.until_queue_of(2).await;
    lock.release().await;
    change.await.expect("changed");
    assert_unauthenticated(login.await.expect("no panic"), "INCORRECT_CREDENTIALS");
    assert_eq!(app.select::<i64>(SESSIONS).await, 1, "that of the change");
    assert!(ana.is_alive().await);
}

#[tokio::test]
async fn a_login_that_comes_before_a_change_of_the_password_leaves_no_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "create function wait() returns trigger language plpgsql as
             'begin perform pg_advisory_xact_lock(1); return new; end';
         create trigger wait before insert on sessions for each row execute function wait()",
    )
    .await;
    let mut lock = app.hold("select pg_advisory_xact_lock(1)").await;
    let anonymous = app.anonymous();
    let login = tokio::spawn(async move { anonymous.logged_in("ana", PASSWORD).await });
    lock.until_queue_of(1).await;
    let change = tokio::spawn({
        let ana = ana.clone();
        async move { ana.change_password(PASSWORD, NEW).await }
    });
    lock.until_queue_of(2).await;
    lock.release().await;
    change.await.expect("changed");
    // Whether it was answered or refused, there is nothing to do with it.
    if let Ok(session) = login.await.expect("no panic") {
        assert!(!session.is_alive().await);
        let refused = session.try_refresh(&session.tokens().refresh_token).await;
        assert_unauthenticated(refused, "REFRESH_TOKEN_INVALID");
    }
    assert_eq!(app.select::<i64>(SESSIONS).await, 1, "that of the change");
    assert!(ana.is_alive().await);
}

#[tokio::test]
async fn a_rehash_does_not_overwrite_a_password_that_is_being_changed() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let hashing_cost = Params::new(64, 3, 1, Some(32)).expect("good parameters");
    let replica = app.replica_with(Config { hashing_cost, ..config() }, keyring()).await;
    let (change, mut lock) = changing(&app, &ana).await;
    let anonymous = app.anonymous().through(&replica.channel);
    let login = tokio::spawn(async move { anonymous.try_log_in("ana", PASSWORD).await });
    lock.until_queue_of(2).await;
    lock.release().await;
    change.await.expect("changed");
    assert_unauthenticated(login.await.expect("no panic"), "INCORRECT_CREDENTIALS");
    let refused = app.anonymous().try_log_in("ana", PASSWORD).await;
    assert_unauthenticated(refused, "INCORRECT_CREDENTIALS");
    app.anonymous().try_log_in("ana", NEW).await.expect("logged in");
}

#[tokio::test]
async fn of_two_changes_of_the_password_one_wins() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold("select from users for update").await;
    let calls = ["the first password", "the other password"].map(|new| {
        let ana = ana.clone();
        async move { (new, ana.try_change_password(PASSWORD, new).await) }
    });
    let calls = tokio::spawn(at_once(calls));
    lock.until_queue_of(2).await;
    lock.release().await;
    let mut won = 0;
    for (new, answer) in calls.await.expect("no panic") {
        let login = app.anonymous().try_log_in("ana", new).await;
        if answer.is_ok() {
            won += 1;
            login.expect("logged in");
        } else {
            assert_unauthenticated(answer, "INCORRECT_CREDENTIALS");
            assert_unauthenticated(login, "INCORRECT_CREDENTIALS");
        }
    }
    assert_eq!(won, 1);
    assert!(ana.is_alive().await);
}

#[tokio::test]
async fn of_several_updates_with_one_etag_one_wins() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let etag = ana.get_user("me").await.etag;
    let mut lock = app.hold("select from users for update").await;
    let calls = ["new1", "new2", "new3"].map(|username| {
        let (ana, user) = (ana.clone(), User { etag: etag.clone(), ..me(username, "") });
        async move { ana.try_update_user(Some(user), None).await }
    });
    let calls = tokio::spawn(at_once(calls));
    lock.until_queue_of(3).await;
    lock.release().await;
    let (won, lost): (Vec<_>, Vec<_>) =
        calls.await.expect("no panic").into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1);
    for refused in lost {
        assert_refused(refused, Code::Aborted, "ETAG_MISMATCH");
    }
    let won = won.into_iter().find_map(Result::ok).and_then(|won| won.into_inner().user);
    assert_eq!(won, Some(ana.get_user("me").await));
}

#[tokio::test]
async fn calls_of_a_user_who_is_being_deleted_are_unauthenticated() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let session = app.logged_in("ana").await;
    assert!(ana.is_alive().await);
    let mut lock = app.hold("delete from users").await;
    let create = tokio::spawn({
        let ana = ana.clone();
        async move { ana.try_create_todo(Some(titled("late"))).await }
    });
    let update = tokio::spawn({
        let ana = ana.clone();
        async move { ana.try_update_user(Some(me("late", "")), None).await }
    });
    let login = tokio::spawn({
        let anonymous = app.anonymous();
        async move { anonymous.try_log_in("ana", PASSWORD).await }
    });
    let refresh =
        tokio::spawn(async move { session.try_refresh(&session.tokens().refresh_token).await });
    lock.until_queue_of(4).await;
    lock.release().await;
    let ended = "SESSION_REVOKED";
    assert_unauthenticated(create.await.expect("no panic"), ended);
    assert_unauthenticated(update.await.expect("no panic"), ended);
    assert_unauthenticated(login.await.expect("no panic"), "INCORRECT_CREDENTIALS");
    assert_unauthenticated(refresh.await.expect("no panic"), "REFRESH_TOKEN_INVALID");

    // The session is still taken for alive here, so each rpc has to find out by itself.
    assert_unauthenticated(ana.try_get_user("me").await, ended);
    assert_unauthenticated(ana.try_delete_user("me", "").await, ended);
    assert_unauthenticated(ana.try_change_password(PASSWORD, NEW).await, ended);
    assert_unauthenticated(ana.try_create_todo(Some(titled("late"))).await, ended);
}

#[tokio::test]
async fn a_statement_that_nobody_waits_for_any_more_holds_up_no_other_call() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold("select from users for update").await;
    let given_up = tokio::spawn({
        let ana = ana.clone();
        async move { ana.try_update_user(Some(me("new", "")), None).await }
    });
    lock.until_queue_of(1).await;
    given_up.abort();
    for _ in 0..3 * config().database_max_connections {
        ana.get_user("me").await;
    }
    lock.until_queue_of(1).await;
    lock.release().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logins_beyond_the_queue_are_refused_while_other_calls_are_answered() {
    // Some 25 ms for a hash: the queue lasts for half a second.
    let hashing_cost = password::default_cost();
    let settings = Config { hashing_threads: 1, hashing_cost, ..config() };
    let app = App::start_with(settings).await;
    let ana = app.signed_up("ana").await;
    let answered = Arc::new(AtomicUsize::new(0));
    let calls: Vec<_> = (0..200)
        .map(|_| {
            let (anonymous, answered) = (app.anonymous(), answered.clone());
            async move {
                let answer = anonymous.try_log_in("ana", PASSWORD).await;
                answered.fetch_add(1, Ordering::Relaxed);
                answer
            }
        })
        .collect();
    let logins = tokio::spawn(at_once(calls));
    eventually("logins are refused", async || answered.load(Ordering::Relaxed) >= 100).await;
    ana.get_user("me").await;
    ana.create_todo("meanwhile").await;
    assert!(answered.load(Ordering::Relaxed) < 200, "logins still wait");

    let answers = logins.await.expect("no panic");
    assert!(answers.iter().any(Result::is_ok));
    // A login that had a place may still be too late, where the machine has much else to do.
    let late =
        |answer: &Answer<_>| answer.as_ref().is_err_and(|s| s.code() == Code::DeadlineExceeded);
    let refused: Vec<_> =
        answers.into_iter().filter(|answer| answer.is_err() && !late(answer)).collect();
    assert!(!refused.is_empty());
    for refused in refused {
        let refused = assert_refused(refused, Code::ResourceExhausted, "OVERLOADED");
        let details = refused.get_error_details();
        let delay = details.retry_info().and_then(|retry| retry.retry_delay);
        assert!(delay.is_some_and(|delay| !delay.is_zero()), "{refused:?}");
    }
    let login = async || app.anonymous().try_log_in("ana", PASSWORD).await;
    eventually("logins are admitted again", async || login().await.is_ok()).await;
}
