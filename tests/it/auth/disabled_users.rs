//! Disabled users.

use std::time::{Duration, Instant};

use fast_zero::proto::todo::v1::WatchTodosRequest;
use tonic::Code;

use crate::support::{
    App, PASSWORD,
    assert::{assert_status, assert_unauthenticated},
    changes::next_message,
    parallel::join_all,
    users::usernames,
    wait::{wait_until, with_timeout},
};

const SESSIONS: &str = "select count(*) from sessions";

#[tokio::test]
async fn a_disabled_user_is_cut_off_on_all_replicas_within_five_seconds() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    let bob = app.signed_up("bob").await;
    let (_, token) = ana.with_new_token(&["todo.read"]).await;
    let callers = [ana.clone(), token].map(|caller| {
        let on_replica = caller.clone().with_channel(&replica.channel);
        [caller, on_replica]
    });
    let callers = callers.concat();
    let mut streams = Vec::new();
    for caller in &callers {
        let mut stream = caller.watch_todos(WatchTodosRequest::default()).await;
        assert!(next_message(&mut stream).await.caught_up);
        streams.push(stream);
    }
    app.operate(&["disable", "ana"]).await;
    let disabled = Instant::now();
    for (caller, mut stream) in callers.iter().zip(streams) {
        wait_until("the replica rejects the credential", async || {
            match caller.try_list_todos(<_>::default()).await {
                Ok(_) => false,
                Err(status) => {
                    assert_eq!(status.code(), Code::Unauthenticated, "{status:?}");
                    true
                }
            }
        })
        .await;
        let end = with_timeout("the stream ends", async {
            loop {
                match stream.message().await {
                    Ok(message) => assert!(message.is_some(), "a watch ends with an error"),
                    Err(status) => break status,
                }
            }
        });
        assert_eq!(end.await.code(), Code::Unauthenticated);
    }
    assert!(disabled.elapsed() < Duration::from_secs(6), "{:?}", disabled.elapsed());
    let refreshed = ana.try_refresh(&ana.tokens().refresh_token).await;
    assert_unauthenticated(refreshed, "REFRESH_TOKEN_INVALID");
    assert!(bob.is_session_active().await, "others go on");
}

#[tokio::test]
async fn only_the_right_password_tells_that_a_user_is_disabled() {
    let app = App::start().await;
    app.create_user("ana").await;
    app.operate(&["disable", "ANA@example.com"]).await;
    for login in ["ana", "ana@example.com"] {
        let rejected = app.anonymous().try_log_in(login, "wrong password").await;
        assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
        let rejected = app.anonymous().try_log_in(login, PASSWORD).await;
        let status = assert_status(rejected, Code::PermissionDenied, "USER_DISABLED");
        assert_eq!(status.message(), "The user is disabled");
    }
    assert_eq!(app.fetch_scalar::<i64>(SESSIONS).await, 0);
}

#[tokio::test]
async fn an_enabled_user_logs_in_but_no_session_token_or_code_comes_back() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let code = app.reset_code("ana").await;
    app.execute(
        "insert into personal_access_tokens
         select id, id, 'a', array['todo.read'], now() + interval '1 day', null,
             sha256('a') from users",
    )
    .await;
    let disabled = app.operate(&["disable", "ana"]).await;
    assert!(disabled.contains(": 1 session ended, 1 personal access token revoked"), "{disabled}");
    app.operate(&["enable", "ana"]).await;
    let tokens = "select count(*) from personal_access_tokens";
    assert_eq!(app.fetch_scalar::<i64>(tokens).await, 0);
    let refreshed = ana.try_refresh(&ana.tokens().refresh_token).await;
    assert_unauthenticated(refreshed, "REFRESH_TOKEN_INVALID");
    let reset = app.anonymous().try_reset_password(&code, "a new password").await;
    assert_unauthenticated(reset, "RESET_CODE_INVALID");
    assert!(app.logged_in("ana").await.is_session_active().await);
}

#[tokio::test]
async fn other_users_see_a_disabled_user_as_before_and_the_names_stay_taken() {
    let app = App::start().await;
    let ana = app.create_user("ana").await;
    let bob = app.signed_up("bob").await;
    let before = bob.get_user(&ana.id).await;
    app.operate(&["disable", "ana"]).await;
    assert_eq!(bob.get_user(&ana.id).await, before, "also the etag");
    assert_eq!(usernames(&bob.list_users(<_>::default()).await.users), ["ana", "bob"]);
    let rename = fast_zero::proto::user::v1::UpdateUserRequest {
        user: Some(fast_zero::proto::user::v1::User {
            id: "me".into(),
            username: "ANA".into(),
            ..<_>::default()
        }),
        update_mask: None,
    };
    let rejected = bob.users().update_user(rename).await;
    assert_status(rejected, Code::AlreadyExists, "USERNAME_EXISTS");
}

#[tokio::test]
async fn a_login_that_waits_for_the_disabling_opens_no_session() {
    let app = App::start().await;
    app.create_user("ana").await;
    // What `disable` does first, not yet committed.
    let mut lock = app.hold_lock("update users set disabled_at = now()").await;
    let anonymous = app.anonymous();
    let login = tokio::spawn(async move { anonymous.try_log_in("ana", PASSWORD).await });
    lock.wait_until_blocking().await;
    lock.release().await;
    let rejected = login.await.expect("no panic");
    assert_status(rejected, Code::PermissionDenied, "USER_DISABLED");
    assert_eq!(app.fetch_scalar::<i64>(SESSIONS).await, 0);
}

#[tokio::test]
async fn a_login_before_the_disabling_leaves_no_session() {
    let app = App::start().await;
    app.create_user("ana").await;
    let mut lock = app.hold_session_inserts().await;
    let anonymous = app.anonymous();
    let login = tokio::spawn(async move { anonymous.try_log_in("ana", PASSWORD).await });
    lock.wait_until_blocked_by(1).await;
    let ((), ()) = tokio::join!(
        async { assert!(app.operate(&["disable", "ana"]).await.contains("1 session ended")) },
        async {
            lock.wait_until_blocked_by(2).await;
            lock.release().await;
        },
    );
    // Whether the login succeeded or failed, its session has ended.
    let _ = login.await.expect("no panic");
    assert_eq!(app.fetch_scalar::<i64>(SESSIONS).await, 0);
}

#[tokio::test]
async fn logins_during_the_disabling_leave_no_session() {
    let app = App::start().await;
    app.create_user("ana").await;
    let logins = (0..20).map(|_| {
        let anonymous = app.anonymous();
        async move { anonymous.try_log_in("ana", PASSWORD).await.err().map(|it| it.code()) }
    });
    let (results, _) = tokio::join!(join_all(logins), app.operate(&["disable", "ana"]));
    for code in results {
        assert!([None, Some(Code::PermissionDenied)].contains(&code), "{code:?}");
    }
    assert_eq!(app.fetch_scalar::<i64>(SESSIONS).await, 0);
}
