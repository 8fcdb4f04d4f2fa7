//! Truncated messages and wrong lengths.

use fast_zero::proto::todo::v1::{CreateTodoRequest, ListTodosRequest};
use prost::Message;
use tokio::io::AsyncWriteExt;
use tonic_types::StatusExt;

use super::CREATE;
use crate::support::{
    App,
    http2::{
        self, END_HEADERS, END_STREAM, PREFACE, connect_raw, frame, length_prefixed, read_frame,
    },
    metrics::config_with_metrics as config,
    raw_client::{full_body, read_rpc_result},
    todos::todo_titled,
    wait::with_timeout,
};

#[tokio::test]
async fn a_truncated_message_is_rejected_and_changes_nothing() {
    let app = App::start_with(config()).await;
    let ana = app.signed_up("ana").await;
    let mut raw = app.raw_client().await.with_token_of(&ana);
    let todo = CreateTodoRequest { todo: Some(todo_titled("a")) };
    let message = length_prefixed(&todo.encode_to_vec());
    for length in [0, 1, 4, 5, message.len() - 1] {
        let cut =
            raw.send(CREATE, full_body(message[..length].to_vec())).await.expect("a response");
        let rejected = read_rpc_result(cut).await.expect_err("an error");
        assert!(rejected.get_error_details().error_info().is_some(), "{rejected:?}");
    }
    assert_eq!(ana.list_all_todos(ListTodosRequest::default()).await, []);
    read_rpc_result(raw.send(CREATE, full_body(message)).await.expect("a response"))
        .await
        .expect("added");
}

#[tokio::test]
async fn a_wrong_content_length_ends_only_its_call() {
    let app = App::start_with(config()).await;
    let mut stream = connect_raw(app.address, PREFACE).await;
    for (id, length) in [(1, "100"), (3, "5")] {
        let block =
            http2::header_block("/grpc.health.v1.Health/Check", &[("content-length", length)]);
        let headers = frame(http2::HEADERS, END_HEADERS, id, &block);
        let data = frame(http2::DATA, END_STREAM, id, &length_prefixed(b""));
        stream.write_all(&[headers, data].concat()).await.expect("sent");
        let kind = loop {
            let frame = with_timeout("a response", read_frame(&mut stream)).await.expect("a frame");
            if frame.stream == id && frame.kind != http2::WINDOW_UPDATE {
                break frame.kind;
            }
        };
        let expected = if id == 1 { http2::RST_STREAM } else { http2::HEADERS };
        assert_eq!(kind, expected, "call {id}");
    }
}
