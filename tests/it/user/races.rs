//! Concurrent sign-ups, updates and deletions.

use fast_zero::proto::user::v1::User;
use tonic::Code;

use crate::support::{
    App, PASSWORD,
    assert::{assert_status, assert_unauthenticated},
    parallel::join_all,
    todos::todo_titled,
    users::own_user,
};

const NEW: &str = "a new password";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_64_concurrent_sign_ups_with_the_same_name_succeeds() {
    let app = App::start().await;
    let calls = (0..64).map(|n| {
        let (caller, username) = (app.anonymous(), if n % 2 == 0 { "ana" } else { "Ana" });
        async move { caller.try_sign_up(username, &format!("ana{n}@example.com"), PASSWORD).await }
    });
    let (succeeded, rejected): (Vec<_>, Vec<_>) =
        join_all(calls).await.into_iter().partition(Result::is_ok);
    assert_eq!(succeeded.len(), 1);
    for rejected in rejected {
        let code = rejected.as_ref().err().map(tonic::Status::code);
        if code == Some(Code::ResourceExhausted) {
            assert_status(rejected, Code::ResourceExhausted, "OVERLOADED");
        } else {
            assert_status(rejected, Code::AlreadyExists, "USERNAME_EXISTS");
        }
    }
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from users").await, 1);
}

#[tokio::test]
async fn one_of_several_concurrent_updates_with_the_same_etag_succeeds() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let etag = ana.get_user("me").await.etag;
    let mut lock = app.hold_lock("select from users for update").await;
    let calls = ["new1", "new2", "new3"].map(|username| {
        let (ana, user) = (ana.clone(), User { etag: etag.clone(), ..own_user(username, "") });
        async move { ana.try_update_user(Some(user), None).await }
    });
    let calls = tokio::spawn(join_all(calls));
    lock.wait_until_blocked_by(3).await;
    lock.release().await;
    let (won, lost): (Vec<_>, Vec<_>) =
        calls.await.expect("no panic").into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1);
    for rejected in lost {
        assert_status(rejected, Code::Aborted, "ETAG_MISMATCH");
    }
    let won = won.into_iter().find_map(Result::ok).and_then(|won| won.into_inner().user);
    assert_eq!(won, Some(ana.get_user("me").await));
}

#[tokio::test]
async fn calls_during_the_deletion_of_their_user_are_unauthenticated() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let session = app.logged_in("ana").await;
    assert!(ana.is_session_active().await);
    let mut lock = app.hold_lock("delete from users").await;
    let create = tokio::spawn({
        let ana = ana.clone();
        async move { ana.try_create_todo(Some(todo_titled("late"))).await }
    });
    let update = tokio::spawn({
        let ana = ana.clone();
        async move { ana.try_update_user(Some(own_user("late", "")), None).await }
    });
    let login = tokio::spawn({
        let anonymous = app.anonymous();
        async move { anonymous.try_log_in("ana", PASSWORD).await }
    });
    let refresh =
        tokio::spawn(async move { session.try_refresh(&session.tokens().refresh_token).await });
    lock.wait_until_blocked_by(4).await;
    lock.release().await;
    let ended = "SESSION_REVOKED";
    assert_unauthenticated(create.await.expect("no panic"), ended);
    assert_unauthenticated(update.await.expect("no panic"), ended);
    assert_unauthenticated(login.await.expect("no panic"), "INCORRECT_CREDENTIALS");
    assert_unauthenticated(refresh.await.expect("no panic"), "REFRESH_TOKEN_INVALID");

    // The session is still cached as active, so each RPC detects the deletion by itself.
    assert_unauthenticated(ana.try_get_user("me").await, ended);
    assert_unauthenticated(ana.try_delete_user("me", "").await, ended);
    assert_unauthenticated(ana.try_change_password(PASSWORD, NEW).await, ended);
    assert_unauthenticated(ana.try_create_todo(Some(todo_titled("late"))).await, ended);
}
