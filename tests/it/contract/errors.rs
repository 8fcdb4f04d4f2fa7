//! Internal errors.

use fast_zero::proto::{todo::v1::ListTodosRequest, user::v1::GetUserRequest};
use tonic::Code;

use super::NO_ID;
use crate::support::{
    App, Client, PASSWORD,
    app::connect,
    assert::{assert_hides_cause, assert_status},
    postgres::TestDatabase,
    process::Binary,
    todos::{discard_message, todo_titled},
};

#[tokio::test]
async fn an_internal_error_hides_its_cause() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    app.execute("drop table todos").await;
    for response in [
        ana.try_get_todo(&todo.id).await.map(discard_message),
        ana.try_list_todos(ListTodosRequest::default()).await.map(discard_message),
        ana.try_create_todo(Some(todo_titled("b"))).await.map(discard_message),
        ana.try_update_todo(Some(todo.clone()), None).await.map(discard_message),
        ana.try_delete_todo(&todo.id, "").await.map(discard_message),
    ] {
        let status = assert_status(response, Code::Internal, "INTERNAL");
        assert_hides_cause(&status);
    }
    let me = GetUserRequest { id: "me".into() };
    ana.users().get_user(me).await.expect("other tables exist");
}

#[tokio::test]
async fn the_log_has_the_cause_of_an_internal_error_with_its_request_id() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let address = server.address().await.parse().expect("an address");
    let anonymous = Client::new(connect(address).await);
    anonymous.sign_up("ana", "ana@example.com", PASSWORD).await;
    let ana = anonymous.logged_in("ana", PASSWORD).await.expect("logged in");
    let mut sql = database.connect().await;
    sqlx::raw_sql("drop table todos").execute(&mut sql).await.expect("dropped");

    let rejected = ana.with_metadata("x-request-id", "find-me").try_get_todo(NO_ID).await;
    assert_status(rejected, Code::Internal, "INTERNAL");
    let line = server.wait_for_line("internal error").await;
    for part in ["\"find-me\"", "\"ERROR\"", "todos", "does not exist"] {
        assert!(line.contains(part), "{part}: {line}");
    }
}
