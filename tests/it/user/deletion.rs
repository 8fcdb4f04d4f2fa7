//! Deleting accounts.

use tonic::Code;

use crate::support::{
    App, PASSWORD,
    assert::{assert_status, assert_unauthenticated},
};

#[tokio::test]
async fn deleting_an_account_deletes_its_data_and_frees_its_names() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let other = app.logged_in("ana").await;
    ana.create_todo("mine").await;
    bob.create_todo("mine").await;
    assert!(ana.is_session_active().await && other.is_session_active().await);

    ana.try_delete_user(&ana.user_id(), "").await.expect("deleted");
    for session in [&ana, &other] {
        assert!(!session.is_session_active().await);
        let rejected = ana.try_refresh(&session.tokens().refresh_token).await;
        assert_unauthenticated(rejected, "REFRESH_TOKEN_INVALID");
    }
    for (rows, left) in [
        ("select count(*) from users", 1),
        ("select count(*) from sessions", 1),
        ("select count(*) from todos", 1),
    ] {
        assert_eq!(app.fetch_scalar::<i64>(rows).await, left, "{rows}");
    }
    assert_unauthenticated(ana.try_log_in("ana", PASSWORD).await, "INCORRECT_CREDENTIALS");
    let deleted = bob.try_get_user(&ana.user_id()).await;
    assert_status(deleted, Code::NotFound, "USER_NOT_FOUND");

    let again = app.signed_up("ana").await;
    assert_ne!(again.user_id(), ana.user_id());
    assert!(again.list_todos(<_>::default()).await.todos.is_empty());
    assert!(!ana.is_session_active().await);
}
