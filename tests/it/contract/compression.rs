//! Compression of messages (gRPC: Compression, and gRPC over HTTP/2).

use fast_zero::proto::todo::v1::{CreateTodoRequest, GetTodoRequest, ListTodosRequest};
use http_body_util::BodyExt;
use prost::Message;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_request::MessageRequest,
};

use super::{CREATE_TODO, GET_TODO, LIST_TODOS, NO_ID};
use crate::support::{
    App, Client, RpcResult,
    assert::{assert_has_error_details, assert_invalid, assert_status},
    compression::{flagged, gunzip, gzip},
    http2::length_prefixed,
    raw_client::{RawClient, full_body, read_rpc_result},
    todos::{discard_message, todo_titled},
};

const CHECK: &str = "/grpc.health.v1.Health/Check";
const REFLECT: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
const MIB: usize = 1024 * 1024;

async fn send(raw: &RawClient, path: &str, message: Vec<u8>) -> RpcResult<()> {
    let response = raw.clone().send(path, full_body(message)).await.expect("a response");
    read_rpc_result(response).await.map(discard_message)
}

async fn gzip_client(app: &App, caller: &Client) -> RawClient {
    app.raw_client().await.with_token_of(caller).with_metadata("grpc-encoding", "gzip")
}

/// Sends a message that is rejected.
async fn assert_rejected(raw: &RawClient, path: &str, message: Vec<u8>, code: Code, reason: &str) {
    let rejected = send(raw, path, message).await;
    if path == REFLECT {
        // A stream ends in the trailers, without the request ID, which is in the headers.
        let status = rejected.expect_err("an error");
        assert_eq!(status.code(), code, "{status:?}");
        assert_has_error_details(&status);
    } else {
        assert_status(rejected, code, reason);
    }
}

/// Returns a request of each service that succeeds.
fn valid_requests() -> [(&'static str, Vec<u8>); 3] {
    let create = CreateTodoRequest { todo: Some(todo_titled("a")) };
    let list = MessageRequest::ListServices(String::new());
    let list = ServerReflectionRequest { message_request: Some(list), ..<_>::default() };
    [
        (CREATE_TODO, create.encode_to_vec()),
        (CHECK, HealthCheckRequest::default().encode_to_vec()),
        (REFLECT, list.encode_to_vec()),
    ]
}

#[tokio::test]
async fn requests_may_be_compressed() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let raw = gzip_client(&app, &ana).await;
    for (path, message) in valid_requests() {
        send(&raw, path, flagged(&gzip(&message))).await.expect(path);
        // The flag decides, not the metadata.
        send(&raw, path, length_prefixed(&message)).await.expect(path);
    }
    let todos = ana.list_all_todos(ListTodosRequest::default()).await;
    assert_eq!(todos.iter().map(|todo| &*todo.title).collect::<Vec<_>>(), ["a", "a"]);
    let get = GetTodoRequest { id: "\0".repeat(MIB - 4) };
    assert_eq!(get.encoded_len(), MIB);
    let rejected = send(&raw, GET_TODO, flagged(&gzip(&get.encode_to_vec()))).await;
    assert_invalid(rejected, &["id"]);
}

#[tokio::test]
async fn the_limit_of_a_request_holds_after_decompression() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let raw = gzip_client(&app, &ana).await;
    for (path, size) in
        [(GET_TODO, MIB + 1), (GET_TODO, 8 * MIB), (CHECK, 4_097), (CHECK, MIB), (REFLECT, MIB)]
    {
        let bomb = flagged(&gzip(&vec![0; size]));
        assert!(bomb.len() < MIB);
        assert_rejected(&raw, path, bomb, Code::OutOfRange, "MESSAGE_TOO_LARGE").await;
    }
    send(&raw, LIST_TODOS, length_prefixed(b"")).await.expect("an open connection");
}

#[tokio::test]
async fn a_message_that_is_not_compressed_as_announced_is_internal() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let plain = app.raw_client().await.with_token_of(&ana);
    let identity = plain.clone().with_metadata("grpc-encoding", "identity");
    let raw = gzip_client(&app, &ana).await;
    for (path, message) in valid_requests() {
        let whole = gzip(&message);
        for invalid in [&message[..], &whole[..whole.len() - 1], &[&*whole, b"x"].concat()] {
            assert_rejected(&raw, path, flagged(invalid), Code::Internal, "INTERNAL").await;
        }
        for raw in [&plain, &identity] {
            assert_rejected(raw, path, flagged(&whole), Code::Internal, "INTERNAL").await;
        }
    }
}

#[tokio::test]
async fn an_unknown_compression_is_unimplemented() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for encoding in ["br", "deflate", "GZIP", ""] {
        let raw = app.raw_client().await.with_metadata("grpc-encoding", encoding);
        let owned = raw.clone().with_token_of(&ana);
        for (path, message) in valid_requests() {
            let rejected = send(&owned, path, length_prefixed(&message)).await;
            let status = assert_status(rejected, Code::Unimplemented, "UNIMPLEMENTED");
            let accepted = status.metadata().get("grpc-accept-encoding").expect("encodings");
            assert_eq!(accepted, "gzip,identity", "{path} {encoding}");
        }
        let stranger = raw.with_metadata("authorization", "Bearer x");
        let rejected = send(&stranger, CREATE_TODO, length_prefixed(b"")).await;
        assert_status(rejected, Code::Unauthenticated, "TOKEN_INVALID");
    }
}

#[tokio::test]
async fn large_responses_are_compressed_for_clients_that_accept_gzip() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for description in ["one of many descriptions", "another one", "a third"] {
        let description = format!("{description}, with words that repeat").repeat(190);
        ana.create_todo_with(fast_zero::proto::todo::v1::Todo {
            description,
            ..todo_titled("large")
        })
        .await;
    }
    let plain = app.raw_client().await.with_token_of(&ana);
    let accepting = plain.clone().with_metadata("grpc-accept-encoding", "identity, gzip");
    let list = async |raw: &RawClient, page_size| {
        let request = ListTodosRequest { page_size, ..<_>::default() };
        let request = full_body(length_prefixed(&request.encode_to_vec()));
        let response = raw.clone().send(LIST_TODOS, request).await.expect("a response");
        let encoding = response.headers().get("grpc-encoding").cloned();
        let body = response.into_body().collect().await.expect("a body").to_bytes();
        (encoding, body)
    };
    let (encoding, whole) = list(&plain, 100).await;
    assert_eq!(encoding, None);
    assert!(whole.len() > 20_000, "{}", whole.len());
    let (encoding, compressed) = list(&accepting, 100).await;
    assert_eq!(encoding.expect("an encoding"), "gzip");
    assert!(compressed.len() < whole.len() / 4, "{}", compressed.len());
    assert_eq!(compressed[0], 1);
    assert_eq!(usize::from(compressed[3]) << 8 | usize::from(compressed[4]), compressed.len() - 5);
    assert_eq!(gunzip(&compressed[5..]), whole[5..]);

    // Too small for the cost.
    let (encoding, small) = list(&accepting, 1).await;
    assert_eq!((encoding, small[0]), (None, 0));
    let missing = GetTodoRequest { id: NO_ID.into() };
    let rejected = accepting.call(GET_TODO, &missing.encode_to_vec()).await;
    assert_status(rejected, Code::NotFound, "TODO_NOT_FOUND");
}
