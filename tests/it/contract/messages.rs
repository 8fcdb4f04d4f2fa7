//! Malformed, unknown and oversized messages and metadata.

use fast_zero::proto::todo::v1::{CreateTodoRequest, GetTodoRequest};
use prost::Message;
use tonic::Code;

use super::{CREATE_TODO, GET_TODO, LIST_TODOS, access::PUBLIC};
use crate::support::{
    App,
    assert::{assert_invalid, assert_status},
    todos::todo_titled,
};

#[tokio::test]
async fn invalid_protobuf_is_internal_and_the_connection_stays_open() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let raw = app.raw_client().await.with_token_of(&ana);
    // An unknown wire type, a truncated field, invalid UTF-8, a wrong wire type.
    for garbage in [&b"\xff\xff\xff"[..], b"\x0a\x7fa", b"\x0a\x01\xff", b"\x08\x01"] {
        let rejected = raw.call(GET_TODO, garbage).await;
        assert_status(rejected, Code::Internal, "INTERNAL");
    }
    raw.call(LIST_TODOS, &[]).await.expect("an open connection");
    let anonymous = app.raw_client().await;
    let rejected = anonymous.call(PUBLIC[0], b"\xff\xff\xff").await;
    assert_status(rejected, Code::Internal, "INTERNAL");
}

#[tokio::test]
async fn unknown_fields_are_ignored() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let raw = app.raw_client().await.with_token_of(&ana);
    // The unknown field 1000 as a string, before and after the known ones.
    let unknown = &b"\xc2\x3e\x01a"[..];
    let create = CreateTodoRequest { todo: Some(todo_titled("a")) }.encode_to_vec();
    raw.call(CREATE_TODO, &[unknown, &create, unknown].concat()).await.expect("added");
}

#[tokio::test]
async fn a_request_above_1_mib_is_out_of_range_and_the_connection_stays_open() {
    const MIB: usize = 1024 * 1024;
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let raw = app.raw_client().await.with_token_of(&ana);
    let request = |size: usize| {
        let id = |length| GetTodoRequest { id: "a".repeat(length) };
        let overhead = id(size).encoded_len() - size;
        id(size - overhead).encode_to_vec()
    };
    assert_eq!(request(MIB).len(), MIB);
    assert_invalid(raw.call(GET_TODO, &request(MIB)).await, &["id"]);
    for size in [MIB + 1, 5 * MIB] {
        let rejected = raw.call(GET_TODO, &request(size)).await;
        assert_status(rejected, Code::OutOfRange, "MESSAGE_TOO_LARGE");
        raw.call(LIST_TODOS, &[]).await.expect("an open connection");
    }
}

#[tokio::test]
async fn metadata_above_16_kib_is_rejected_and_the_connection_stays_open() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let raw = app.raw_client().await.with_token_of(&ana);
    raw.clone()
        .with_metadata("x-small", "a".repeat(8 * 1024))
        .call(LIST_TODOS, &[])
        .await
        .expect("listed");
    let large = raw.clone().with_metadata("x-large", "a".repeat(17 * 1024));
    large.call(LIST_TODOS, &[]).await.expect_err("an oversized message");
    raw.call(LIST_TODOS, &[]).await.expect("an open connection");
}
