//! The number of SQL statements of each call.

use fast_zero::proto::{
    auth::v1::{
        ChangePasswordRequest, ListSessionsRequest, LoginRequest, LogoutRequest,
        RefreshTokenRequest,
    },
    todo::v1::{
        CreateTodoRequest, DeleteTodoRequest, GetTodoRequest, ListDeletedTodosRequest,
        ListTodosRequest, SyncTodosRequest, Todo, UpdateTodoRequest, WatchTodosRequest,
    },
    user::v1::{CreateUserRequest, GetUserRequest, ListUsersRequest, UpdateUserRequest, User},
};

use crate::support::{
    App, Client, PASSWORD, app::unique_name, changes::next_message, statements::statement_count,
};

/// Makes a call with its own request id, and returns the number of its statements.
async fn count<T>(client: &Client, call: impl AsyncFnOnce(Client) -> T) -> usize {
    let request_id = unique_name("statements-");
    call(client.clone().with_metadata("x-request-id", &request_id)).await;
    statement_count(&request_id)
}

#[tokio::test]
async fn a_call_with_a_cached_session_costs_one_statement() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("warm the session up").await;

    let get_user = count(&ana, async |ana| {
        ana.users().get_user(GetUserRequest { id: "me".into() }).await.expect("a response")
    });
    assert_eq!(get_user.await, 1, "GetUser");

    let list_users = count(&ana, async |ana| {
        ana.users().list_users(ListUsersRequest::default()).await.expect("a response")
    });
    assert_eq!(list_users.await, 1, "ListUsers");

    let update_user = count(&ana, async |ana| {
        let user = User { id: "me".into(), username: "ana2".into(), ..User::default() };
        let request = UpdateUserRequest { user: Some(user), update_mask: None };
        ana.users().update_user(request).await.expect("a response")
    });
    assert_eq!(update_user.await, 1, "UpdateUser");

    let create = count(&ana, async |ana| {
        let todo = Todo { title: "one".into(), ..Todo::default() };
        ana.todos().create_todo(CreateTodoRequest { todo: Some(todo) }).await.expect("a response")
    });
    assert_eq!(create.await, 1, "CreateTodo");

    let get = count(&ana, async |ana| {
        ana.todos().get_todo(GetTodoRequest { id: todo.id.clone() }).await.expect("a response")
    });
    assert_eq!(get.await, 1, "GetTodo");

    let list = count(&ana, async |ana| {
        ana.todos().list_todos(ListTodosRequest::default()).await.expect("a response")
    });
    assert_eq!(list.await, 1, "ListTodos");

    let update = count(&ana, async |ana| {
        let todo = Todo { title: "two".into(), ..todo.clone() };
        let request = UpdateTodoRequest { todo: Some(todo), update_mask: None };
        ana.todos().update_todo(request).await.expect("a response")
    });
    assert_eq!(update.await, 1, "UpdateTodo");

    let delete = count(&ana, async |ana| {
        let request = DeleteTodoRequest { id: todo.id.clone(), ..<_>::default() };
        ana.todos().delete_todo(request).await.expect("a response")
    });
    assert_eq!(delete.await, 1, "DeleteTodo");

    let list_deleted = count(&ana, async |ana| {
        let request = ListDeletedTodosRequest::default();
        ana.todos().list_deleted_todos(request).await.expect("a response")
    });
    assert_eq!(list_deleted.await, 1, "ListDeletedTodos");

    let sync = count(&ana, async |ana| ana.sync_todos(SyncTodosRequest::default()).await);
    assert_eq!(sync.await, 1, "SyncTodos");

    let watch = count(&ana, async |ana| {
        let mut stream = ana.watch_todos(WatchTodosRequest::default()).await;
        next_message(&mut stream).await
    });
    assert_eq!(watch.await, 1, "WatchTodos, for each message");

    let undelete = count(&ana, async |ana| ana.undelete_todo(&todo.id).await);
    assert_eq!(undelete.await, 1, "UndeleteTodo");

    let purge = count(&ana, async |ana| ana.purge_todo(&todo.id).await);
    assert_eq!(purge.await, 1, "DeleteTodo of a todo with purge");

    let purge = count(&ana, async |ana| {
        let deleted = ana.create_todo("deleted first").await;
        ana.delete_todo(&deleted.id).await;
        ana.purge_todo(&deleted.id).await
    });
    assert_eq!(purge.await, 3, "CreateTodo, DeleteTodo, and DeleteTodo with purge");

    let sessions = count(&ana, async |ana| {
        ana.auth().list_sessions(ListSessionsRequest {}).await.expect("a response")
    });
    assert_eq!(sessions.await, 1, "ListSessions");

    let logout = count(&ana, async |ana| {
        ana.auth().logout(LogoutRequest { scope: 0 }).await.expect("a response")
    });
    assert_eq!(logout.await, 1, "Logout");
}

#[tokio::test]
async fn a_session_cache_miss_costs_one_more_statement() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let cold = count(&ana, async |ana| {
        ana.users().get_user(GetUserRequest { id: "me".into() }).await.expect("a response")
    });
    assert_eq!(cold.await, 2);
}

#[tokio::test]
async fn a_call_with_a_personal_access_token_costs_as_many_statements_as_with_a_session() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("warm the session up").await;
    // The user, and the transaction: begin, lock of the user, count, insert, deletion, commit.
    let create = count(&ana, async |ana| ana.create_token(&["user.read"]).await).await;
    assert!((5..=7).contains(&create), "CreatePersonalAccessToken: {create}");

    let (token, job) = ana.with_new_token(&["user.read"]).await;
    let get_user = async || {
        let call = count(&job, async |job| {
            job.users().get_user(GetUserRequest { id: "me".into() }).await.expect("a response")
        });
        call.await
    };
    // The use of the token is stored in the background.
    assert_eq!(get_user().await, 2, "GetUser, with a cache miss");
    assert_eq!(get_user().await, 1, "GetUser");
    let list = count(&ana, async |ana| ana.list_tokens().await);
    assert_eq!(list.await, 1, "ListPersonalAccessTokens");
    let revoke = count(&ana, async |ana| ana.try_revoke_token(&token.id).await.expect("revoked"));
    assert_eq!(revoke.await, 1, "RevokePersonalAccessToken");
}

#[tokio::test]
async fn sign_up_login_and_refresh_cost_few_statements() {
    let app = App::start().await;
    let anonymous = app.anonymous();
    let sign_up = count(&anonymous, async |client| {
        let request = CreateUserRequest {
            username: "ana".into(),
            email: "ana@example.com".into(),
            password: PASSWORD.into(),
        };
        client.users().create_user(request).await.expect("a response")
    });
    assert_eq!(sign_up.await, 1, "CreateUser");

    // The user, the new session, and the deletion of old sessions.
    let login = count(&anonymous, async |client| {
        let request = LoginRequest { login: "ana".into(), password: PASSWORD.into() };
        client.auth().login(request).await.expect("a response")
    });
    assert_eq!(login.await, 3, "Login");

    let ana = app.logged_in("ana").await;
    let refresh = count(&anonymous, async |client| {
        let refresh_token = ana.tokens().refresh_token.clone();
        client
            .auth()
            .refresh_token(RefreshTokenRequest { refresh_token })
            .await
            .expect("a response")
    });
    assert_eq!(refresh.await, 1, "RefreshToken");

    ana.create_todo("warm the session up").await;
    // The user, and the transaction: begin, update of the user, deletion of sessions, commit.
    let change = count(&ana, async |ana| {
        let request = ChangePasswordRequest {
            current_password: PASSWORD.into(),
            new_password: "another password".into(),
        };
        ana.auth().change_password(request).await.expect("a response")
    });
    let change = change.await;
    assert!((3..=5).contains(&change), "ChangePassword: {change}");

    // The code, and the transaction: begin, update of the user with the end of the code, deletion of
    // sessions and of personal access tokens, commit.
    let code = app.reset_code("ana").await;
    let reset = count(&anonymous, async |client| client.reset_password(&code, PASSWORD).await);
    let reset = reset.await;
    assert!((4..=6).contains(&reset), "ResetPassword: {reset}");

    let typo = count(&anonymous, async |client| client.try_reset_password("fzr_", PASSWORD).await);
    assert_eq!(typo.await, 0, "ResetPassword with a typo");
}
