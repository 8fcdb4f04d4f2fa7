//! gRPC over HTTP/2: what the protocol demands of a server.

use fast_zero::proto::todo::v1::{GetTodoRequest, ListTodosRequest};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use prost::Message;
use tonic::{Code, Status};

use super::{GET_TODO, LIST_TODOS, NO_ID};
use crate::support::{
    App,
    assert::{assert_has_error_details, assert_status},
    compression::{flagged, gzip},
    http2::length_prefixed,
    raw_client::{RawClient, full_body, read_rpc_result},
};

const CHECK: &str = "/grpc.health.v1.Health/Check";

fn request(method: Method, content_type: Option<&str>) -> http::request::Builder {
    let request = Request::builder().method(method);
    match content_type {
        Some(content_type) => request.header("content-type", content_type),
        None => request,
    }
}

/// Checks a health service that needs no token.
async fn check(raw: &RawClient, request: http::request::Builder) -> Response<Incoming> {
    raw.clone().send_http(request, CHECK, full_body(length_prefixed(b""))).await
}

fn assert_is_error(response: &Response<Incoming>, code: Code) {
    let status = Status::from_header_map(response.headers()).expect("a status");
    assert_eq!(status.code(), code);
    assert_has_error_details(&status);
}

#[tokio::test]
async fn a_method_other_than_post_is_not_allowed() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    for method in [Method::GET, Method::PUT, Method::DELETE, Method::OPTIONS, Method::HEAD] {
        for path in [CHECK, LIST_TODOS, "/", "/favicon.ico"] {
            let request = request(method.clone(), Some("application/grpc"));
            let response = raw.clone().send_http(request, path, full_body("")).await;
            assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
            assert_eq!(response.headers()["allow"], "POST");
            assert_is_error(&response, Code::Unimplemented);
        }
    }
}

#[tokio::test]
async fn a_content_type_other_than_that_of_grpc_is_unsupported() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    for content_type in [
        None,
        Some(""),
        Some("application/json"),
        Some("text/plain"),
        Some("application/grp"),
        Some("application/grpc-web"),
        Some("application/grpc-web+proto"),
        Some("application/grpcx"),
    ] {
        let response = check(&raw, request(Method::POST, content_type)).await;
        assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE, "{content_type:?}");
        assert_is_error(&response, Code::Unimplemented);
    }
    for content_type in [
        "application/grpc",
        "application/grpc+proto",
        "application/grpc;charset=utf-8",
        "Application/gRPC+proto",
    ] {
        let response = check(&raw, request(Method::POST, Some(content_type))).await;
        assert_eq!(response.status(), StatusCode::OK, "{content_type}");
        read_rpc_result(response).await.expect(content_type);
    }
}

/// `te` detects proxies that drop trailers, which the client has to find out, not the server.
#[tokio::test]
async fn a_call_without_te_succeeds() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    let request = request(Method::POST, Some("application/grpc"));
    read_rpc_result(check(&raw, request).await).await.expect("SERVING");
}

/// Returns the headers and trailers of a response.
async fn headers_and_trailers(response: Response<Incoming>) -> (HeaderMap, Option<HeaderMap>) {
    assert_eq!(response.status(), StatusCode::OK);
    let (head, body) = response.into_parts();
    let body = body.collect().await.expect("a body");
    (head.headers, body.trailers().cloned())
}

#[tokio::test]
async fn the_status_is_in_the_trailers_or_the_response_has_only_trailers() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut raw = app.raw_client().await.with_token_of(&ana);
    let list = full_body(length_prefixed(&ListTodosRequest::default().encode_to_vec()));
    let listed = raw.send(LIST_TODOS, list).await.expect("a response");
    let (headers, trailers) = headers_and_trailers(listed).await;
    assert_eq!(headers["content-type"], "application/grpc");
    assert!(!headers.contains_key("grpc-status"), "{headers:?}");
    assert_eq!(trailers.expect("trailers")["grpc-status"], "0");

    let get = full_body(length_prefixed(&GetTodoRequest { id: NO_ID.into() }.encode_to_vec()));
    let missing = raw.send(GET_TODO, get).await.expect("a response");
    let (headers, trailers) = headers_and_trailers(missing).await;
    assert_eq!(headers["content-type"], "application/grpc");
    assert_eq!(headers["grpc-status"], "5");
    assert_eq!(trailers, None);
    // Binary values should have no padding.
    let details = headers["grpc-status-details-bin"].as_bytes();
    assert!(!details.contains(&b'='), "{headers:?}");
    let message = headers["grpc-message"].as_bytes();
    assert!(message.iter().all(|byte| (0x20..0x7f).contains(byte)), "{headers:?}");
}

#[tokio::test]
async fn a_path_without_a_method_is_unimplemented() {
    let app = App::start().await;
    let raw = app.raw_client().await;
    for path in [
        "/",
        "/fastzero.todo.v1.TodoService",
        "/fastzero.todo.v1.TodoService/",
        "//",
        "/x",
        "/grpc.health.v1.Health/Check/",
        "/grpc.health.v1.Health/Check?a=b",
        "/grpc.health.v1.Health/Check?",
    ] {
        let rejected = raw.call(path, b"").await;
        assert_status(rejected, Code::Unimplemented, "UNIMPLEMENTED");
    }
}

#[tokio::test]
async fn a_request_without_a_message_or_with_two_is_unimplemented() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut raw = app.raw_client().await.with_token_of(&ana);
    let message = length_prefixed(&ListTodosRequest::default().encode_to_vec());
    for body in [vec![], message.repeat(2), [&*message, b"x"].concat()] {
        let response = raw.send(LIST_TODOS, full_body(body)).await.expect("a response");
        let rejected = read_rpc_result(response).await;
        assert_status(rejected, Code::Unimplemented, "UNIMPLEMENTED");
    }
}

#[tokio::test]
async fn a_health_call_without_a_message_or_with_two_is_unimplemented() {
    let app = App::start().await;
    let mut raw = app.raw_client().await;
    let mut gzip_raw = raw.clone().with_metadata("grpc-encoding", "gzip");
    for path in [CHECK, "/grpc.health.v1.Health/Watch"] {
        for (raw, message) in
            [(&mut raw, length_prefixed(b"")), (&mut gzip_raw, flagged(&gzip(b"")))]
        {
            for body in [vec![], message.repeat(2), [&*message, b"x"].concat()] {
                let response = raw.send(path, full_body(body)).await.expect("a response");
                let rejected = read_rpc_result(response).await;
                assert_status(rejected, Code::Unimplemented, "UNIMPLEMENTED");
            }
        }
    }
    raw.call(CHECK, b"").await.expect("SERVING");
}
