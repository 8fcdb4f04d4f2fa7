//! Which methods need an access token.

use fast_zero::proto::{
    FILE_DESCRIPTOR_SET,
    todo::v1::{GetTodoRequest, Todo},
};
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::Code;
use tonic_types::StatusExt;

use super::{GET_TODO, LIST_TODOS, UPDATE_TODO, update_of};
use crate::support::{
    App,
    assert::{assert_status, assert_unauthenticated},
};

/// The methods that the API marks as public.
pub const PUBLIC: [&str; 5] = [
    "/fastzero.auth.v1.AuthService/ListSigningKeys",
    "/fastzero.auth.v1.AuthService/Login",
    "/fastzero.auth.v1.AuthService/RefreshToken",
    "/fastzero.auth.v1.AuthService/ResetPassword",
    "/fastzero.user.v1.UserService/CreateUser",
];

/// Returns the paths of all methods of the API.
fn methods() -> Vec<String> {
    let descriptors = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("valid descriptors");
    let mut methods = Vec::new();
    for file in &descriptors.file {
        for service in &file.service {
            for method in &service.method {
                methods.push(format!("/{}.{}/{}", file.package(), service.name(), method.name()));
            }
        }
    }
    methods
}

#[tokio::test]
async fn every_method_needs_an_access_token_unless_it_is_public() {
    let app = App::start().await;
    let anonymous = app.raw_client().await;
    let methods = methods();
    assert_eq!(methods.len(), 26, "the API has 5 RPCs for users, 12 for sessions and 9 for todos");
    assert!(PUBLIC.iter().all(|public| methods.iter().any(|method| method == public)));
    for method in methods {
        // Anonymous callers learn nothing about missing fields.
        let response = anonymous.call(&method, &[]).await;
        if PUBLIC.contains(&&*method) {
            // An empty message is valid for one of them.
            let Err(status) = response else {
                assert!(method.ends_with("/ListSigningKeys"), "{method}");
                continue;
            };
            assert_ne!(
                status.get_details_error_info().expect("a reason").reason,
                "NOT_AUTHENTICATED"
            );
            assert_ne!(status.message(), "Not authenticated", "{method}");
        } else {
            let status = assert_unauthenticated(response, "NOT_AUTHENTICATED");
            assert_eq!(status.message(), "Not authenticated", "{method}");
        }
    }
}

#[tokio::test]
async fn health_and_reflection_are_public() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    raw.call("/grpc.health.v1.Health/Check", &[]).await.expect("a response");
    // `list_services: ""`
    for version in ["v1", "v1alpha"] {
        let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        raw.call(&path, &[0x3a, 0]).await.expect("a response");
    }
}

#[tokio::test]
async fn the_scheme_is_bearer_in_any_case() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let token = &ana.tokens().access_token;
    for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
        let raw =
            app.raw_client().await.with_metadata("authorization", format!("{scheme} {token}"));
        raw.call(LIST_TODOS, &[]).await.expect("listed");
    }
    for other in ["", "Bearer", "Bearer ", "Basic YTpi", token, &format!("Token {token}")] {
        let raw = app.raw_client().await.with_metadata("authorization", other);
        assert_unauthenticated(raw.call(LIST_TODOS, &[]).await, "NOT_AUTHENTICATED");
    }
}

#[tokio::test]
async fn an_unknown_method_is_unimplemented_with_and_without_a_token() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let anonymous = app.raw_client().await;
    let with_token = anonymous.clone().with_token_of(&ana);
    for path in [
        "/fastzero.todo.v1.TodoService/ShredTodo",
        "/fastzero.todo.v1.TodoService/getTodo",
        "/fastzero.todo.v1.TodoService/",
        "/fastzero.todo.v2.TodoService/GetTodo",
        "/fastzero.billing.v1.BillingService/Pay",
        "/fastzero.todo.v1.TodoService/GetTodo/",
        "/grpc.health.v1.Health/Chuck",
        "/grpc.reflection.v1.ServerReflection/Nothing",
        "/",
    ] {
        for caller in [&anonymous, &with_token] {
            assert_status(caller.call(path, &[]).await, Code::Unimplemented, "UNIMPLEMENTED");
        }
    }
}

#[tokio::test]
async fn authentication_comes_before_everything_else() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("a").await;
    let anonymous = app.raw_client().await;
    let get = GetTodoRequest { id: todo.id.clone() }.encode_to_vec();
    let large = vec![0; 2 * 1024 * 1024];
    for (path, message) in [
        (GET_TODO, &get[..]),
        (UPDATE_TODO, &update_of(Todo { etag: "x".into(), ..todo })),
        (GET_TODO, b"\xff\xff\xff"),
        (GET_TODO, &large),
    ] {
        let rejected = anonymous.call(path, message).await;
        assert_unauthenticated(rejected, "NOT_AUTHENTICATED");
    }
    let rejected = anonymous.with_metadata("grpc-timeout", "soon").call(GET_TODO, &get).await;
    assert_unauthenticated(rejected, "NOT_AUTHENTICATED");
}
