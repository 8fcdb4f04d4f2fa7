//! gRPC server reflection.

use std::collections::BTreeSet;

use prost::Message;
use prost_types::FileDescriptorProto;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1::{
    ExtensionRequest, ServerReflectionRequest, ServerReflectionResponse,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::support::{
    App, RpcResult,
    app::config_with,
    assert::assert_status,
    health::check_health,
    http2::length_prefixed,
    raw_client::{RawClient, full_body, read_rpc_result},
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

/// Sends requests in one stream, and returns the responses.
async fn reflect_all(
    raw: &RawClient,
    version: &str,
    requests: &[ServerReflectionRequest],
) -> Vec<ServerReflectionResponse> {
    let path = format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
    let requests: Vec<_> =
        requests.iter().flat_map(|request| length_prefixed(&request.encode_to_vec())).collect();
    let response = raw.clone().send(&path, full_body(requests)).await.expect("a response");
    let mut bytes = &*read_rpc_result(response).await.expect("OK at the end").into_inner();
    let mut responses = Vec::new();
    while let Some((prefix, rest)) = bytes.split_first_chunk::<5>() {
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
        let (message, rest) = rest.split_at(length);
        responses.push(ServerReflectionResponse::decode(message).expect("a response"));
        bytes = rest;
    }
    responses
}

#[tokio::test]
async fn an_error_is_a_response_and_the_stream_goes_on() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    let extension = |containing_type: &str, extension_number| {
        let containing_type = containing_type.to_owned();
        MessageRequest::FileContainingExtension(ExtensionRequest {
            containing_type,
            extension_number,
        })
    };
    let unknown = "no.such.Symbol".to_owned();
    let requests = [
        (Some(MessageRequest::FileContainingSymbol(unknown.clone())), Some(Code::NotFound)),
        (Some(MessageRequest::FileByFilename(unknown.clone())), Some(Code::NotFound)),
        (Some(MessageRequest::AllExtensionNumbersOfType(unknown)), Some(Code::NotFound)),
        (Some(extension("google.protobuf.MethodOptions", 1)), Some(Code::NotFound)),
        (None, Some(Code::InvalidArgument)),
        (Some(MessageRequest::ListServices("*".to_owned())), None),
    ];
    for version in REFLECTION {
        let sent = requests.clone().map(|(message_request, _)| ServerReflectionRequest {
            host: "a.example".to_owned(),
            message_request,
        });
        let responses = reflect_all(&raw, version, &sent).await;
        assert_eq!(responses.len(), requests.len(), "{version}");
        for ((response, sent), (_, code)) in responses.iter().zip(&sent).zip(&requests) {
            assert_eq!(response.valid_host, "a.example");
            assert_eq!(response.original_request.as_ref(), Some(sent));
            let error = match &response.message_response {
                Some(MessageResponse::ErrorResponse(error)) => Some(Code::from(error.error_code)),
                _ => None,
            };
            assert_eq!(error, *code, "{version} {sent:?}");
        }
    }
}

#[tokio::test]
async fn extensions_are_described() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    let options = "google.protobuf.MethodOptions".to_owned();
    for version in REFLECTION {
        let request = MessageRequest::AllExtensionNumbersOfType(options.clone());
        let MessageResponse::AllExtensionNumbersResponse(numbers) =
            reflect(&raw, version, request).await
        else {
            panic!("no numbers");
        };
        assert_eq!(
            (numbers.base_type_name, numbers.extension_number),
            (options.clone(), vec![50710])
        );
        let request = MessageRequest::FileContainingExtension(ExtensionRequest {
            containing_type: options.clone(),
            extension_number: 50710,
        });
        let by_extension = reflect(&raw, version, request).await;
        for symbol in ["fastzero.access.v1.access", "fastzero.access.v1.Access.level"] {
            let request = MessageRequest::FileContainingSymbol(symbol.to_owned());
            assert_eq!(reflect(&raw, version, request).await, by_extension, "{symbol}");
        }
        // A message without extensions.
        let request = MessageRequest::AllExtensionNumbersOfType("fastzero.todo.v1.Todo".to_owned());
        let MessageResponse::AllExtensionNumbersResponse(numbers) =
            reflect(&raw, version, request).await
        else {
            panic!("no numbers");
        };
        assert!(numbers.extension_number.is_empty(), "{numbers:?}");
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
