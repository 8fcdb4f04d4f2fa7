//! Which error a call with several faults returns.

use fast_zero::proto::{
    auth::v1::RevokeSessionRequest,
    todo::v1::Todo,
    user::v1::{DeleteUserRequest, GetUserRequest, UpdateUserRequest, User},
};
use tonic::Code;

use super::NO_ID;
use crate::support::{
    App,
    assert::{assert_invalid, assert_status},
    todos::todo_titled,
};

#[tokio::test]
async fn validation_comes_before_permission_existence_and_state() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let todo = ana.create_todo("a").await;
    let bad_user = |id: String| {
        let user = User { id, username: "!".into(), etag: "x".into(), ..User::default() };
        UpdateUserRequest { user: Some(user), update_mask: None }
    };
    for id in [bob.user_id(), NO_ID.to_owned(), "me".into()] {
        let rejected = ana.users().update_user(bad_user(id)).await;
        assert_invalid(rejected, &["user.username"]);
    }
    for id in [todo.id, NO_ID.to_owned()] {
        let bad_todo = Todo { id, etag: "x".into(), ..todo_titled("\0") };
        assert_invalid(ana.try_update_todo(Some(bad_todo), None).await, &["todo.title"]);
    }
}

#[tokio::test]
async fn permission_comes_before_existence_and_existence_before_state() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for id in [bob.user_id(), NO_ID.to_owned()] {
        // The username conflicts, and no user has this etag.
        let user =
            User { id: id.clone(), username: "ana".into(), etag: "x".into(), ..User::default() };
        let update = UpdateUserRequest { user: Some(user), update_mask: None };
        let rejected = ana.users().update_user(update).await;
        assert_status(rejected, Code::PermissionDenied, "NOT_ENOUGH_PERMISSIONS");
        let delete = DeleteUserRequest { id, etag: "x".into() };
        let rejected = ana.users().delete_user(delete).await;
        assert_status(rejected, Code::PermissionDenied, "NOT_ENOUGH_PERMISSIONS");
    }
    let get = GetUserRequest { id: NO_ID.into() };
    assert_status(ana.users().get_user(get).await, Code::NotFound, "USER_NOT_FOUND");
    let revoke = RevokeSessionRequest { session_id: NO_ID.into() };
    let rejected = ana.auth().revoke_session(revoke).await;
    assert_status(rejected, Code::NotFound, "SESSION_NOT_FOUND");
    assert_status(ana.try_delete_todo(NO_ID, "x").await, Code::NotFound, "TODO_NOT_FOUND");
}
