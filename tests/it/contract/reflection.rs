//! gRPC server reflection.

use std::collections::BTreeSet;

use prost::Message;
use prost_types::FileDescriptorProto;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, ServerReflectionResponse, server_reflection_request::MessageRequest,
    server_reflection_response::MessageResponse,
};

use crate::support::{
    App, RpcResult,
    app::config_with,
    assert::{assert_has_error_details, assert_status},
    health::check_health,
    raw_client::RawClient,
    todos::{discard_message, todo_titled},
};

/// The versions of server reflection.
const REFLECTION: [&str; 2] = ["v1", "v1alpha"];

async fn try_reflect(
    raw: &RawClient,
    version: &str,
    request: MessageRequest,
) -> RpcResult<Vec<u8>> {
    let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
    let request = ServerReflectionRequest { message_request: Some(request), ..<_>::default() };
    raw.call(&path, &request.encode_to_vec()).await
}

/// Sends a request. The messages of both versions are equal.
async fn reflect(raw: &RawClient, version: &str, request: MessageRequest) -> MessageResponse {
    let response = try_reflect(raw, version, request).await.expect("a response").into_inner();
    let response = ServerReflectionResponse::decode(&*response).expect("a response");
    response.message_response.expect("a message")
}

/// Returns the names of the files that a file imports.
async fn imports(raw: &RawClient, version: &str, request: MessageRequest) -> Vec<String> {
    let MessageResponse::FileDescriptorResponse(files) = reflect(raw, version, request).await
    else {
        panic!("no file descriptor");
    };
    let decode = |file: &Vec<u8>| FileDescriptorProto::decode(&**file).expect("a descriptor");
    files.file_descriptor_proto.iter().flat_map(|file| decode(file).dependency).collect()
}

#[tokio::test]
async fn reflection_lists_every_service_and_describes_it() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    for version in REFLECTION {
        let listed = reflect(&raw, version, MessageRequest::ListServices(String::new())).await;
        let MessageResponse::ListServicesResponse(listed) = listed else {
            panic!("no list");
        };
        let listed: BTreeSet<_> = listed.service.into_iter().map(|service| service.name).collect();
        let expected = [
            "fastzero.auth.v1.AuthService",
            "fastzero.todo.v1.TodoService",
            "fastzero.user.v1.UserService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        ];
        assert_eq!(listed, expected.map(str::to_owned).into(), "{version}");

        // A client needs the files of all services and their imports.
        let mut files = vec!["fastzero/error/v1/error_reason.proto".to_owned()];
        for service in listed {
            let request = MessageRequest::FileContainingSymbol(service);
            files.extend(imports(&raw, version, request).await);
        }
        while let Some(file) = files.pop() {
            let request = MessageRequest::FileByFilename(file);
            files.extend(imports(&raw, version, request).await);
        }
    }
}

#[tokio::test]
async fn an_unknown_symbol_has_the_details_of_every_error() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    for version in REFLECTION {
        let request = MessageRequest::FileContainingSymbol("no.such.Symbol".to_owned());
        let status = try_reflect(&raw, version, request).await.expect_err("unknown");
        assert_eq!(status.code(), Code::NotFound);
        assert_has_error_details(&status);
    }
}

#[tokio::test]
async fn reflection_can_be_disabled() {
    let app = App::start_with(config_with(|config| {
        config.listen.reflection = false;
    }))
    .await;
    let raw = app.raw_client().await;
    for version in REFLECTION {
        let request = MessageRequest::ListServices(String::new());
        let rejected = try_reflect(&raw, version, request).await.map(discard_message);
        assert_status(rejected, Code::Unimplemented, "UNIMPLEMENTED");
    }
    assert_eq!(check_health(&app.channel, "").await, ServingStatus::Serving);
    app.signed_up("ana").await.create_todo_with(todo_titled("everything else works")).await;
}
