//! The memory that calls may reserve.

use hyper::body::Incoming;
use prost::Message;
use tokio::task::JoinSet;
use tonic::Code;

use super::{CREATE, GET, LIST, assert_overloaded, other_client, user_with_large_list, whole_list};
use crate::support::{
    App,
    http2::length_prefixed,
    metrics::config_with_metrics as config,
    parallel::join_all,
    raw_client::{RawClient, full_body, read_rpc_result, unfinished_body},
    wait::with_timeout,
};

/// Makes `calls` list calls without reading. Returns the unread responses and the number of
/// shed calls.
async fn unread(raw: &RawClient, calls: usize) -> (Vec<http::Response<Incoming>>, usize) {
    let calls =
        (0..calls).map(|_| {
            let mut raw = raw.clone();
            async move {
                raw.send(LIST, full_body(length_prefixed(&whole_list().encode_to_vec()))).await
            }
        });
    let (mut unread, mut rejected) = (Vec::new(), 0);
    for response in join_all(calls).await {
        let response = response.expect("a response");
        if response.headers().contains_key("grpc-status") {
            assert_overloaded(read_rpc_result(response).await);
            rejected += 1;
        } else {
            unread.push(response);
        }
    }
    (unread, rejected)
}

#[tokio::test]
async fn a_client_that_reads_nothing_leaves_memory_for_others() {
    let app = App::start_with(config()).await;
    let ana = user_with_large_list(&app).await;
    // Twice, because closed connections release their memory.
    for _ in 0..2 {
        let other = other_client(&app, &ana).await;
        let (unread, rejected) = unread(&other, 20).await;
        assert_eq!((unread.len(), rejected), (12, 8));
        ana.list_todos(whole_list()).await;
        drop((other, unread));
        app.wait_until_connections(1).await;
    }
}

#[tokio::test]
async fn incomplete_requests_leave_memory_for_others() {
    let app = App::start_with(config()).await;
    let ana = user_with_large_list(&app).await;
    let mut large = length_prefixed(&vec![0; 1024 * 1024]);
    let last = large.pop().expect("a byte");
    for _ in 0..2 {
        let other = other_client(&app, &ana).await;
        let mut calls = JoinSet::new();
        for _ in 0..12 {
            let (mut raw, almost) = (other.clone(), large.clone());
            calls.spawn(async move { raw.send(CREATE, unfinished_body(almost)).await });
        }
        let rejected = with_timeout("a rejection", calls.join_next()).await.expect("one");
        let rejected = rejected.expect("no panic").expect("a response");
        assert_overloaded(read_rpc_result(rejected).await);
        ana.list_todos(whole_list()).await;
        let mut raw = app.raw_client().await.with_token_of(&ana);
        let whole = full_body([&large[..], &[last]].concat());
        let read = raw.send(CREATE, whole).await.expect("a response");
        let read = read_rpc_result(read).await.expect_err("an invalid request");
        assert_eq!(read.code(), Code::Internal, "the server read the whole request: {read:?}");
        calls.shutdown().await;
        drop(other);
        app.wait_until_in_flight(0).await;
    }
}

#[tokio::test]
async fn metadata_reserves_memory_as_messages_do() {
    const CALLS_PER_CONNECTION: u32 = 80;
    let app = App::start_with(config()).await;
    let ana = app.signed_up("ana").await;
    for (connections, entries, length, all_come) in [
        (3, 1, 15, true),
        // What each call takes besides.
        (5, 1, 15, false),
        (3, 1, 15_000, false),
        // What each entry takes besides.
        (2, 400, 1, false),
    ] {
        let mut calls = JoinSet::new();
        for _ in 0..connections {
            let mut raw = other_client(&app, &ana).await;
            for _ in 0..entries {
                raw = raw.with_metadata("a", "x".repeat(length));
            }
            for _ in 0..CALLS_PER_CONNECTION {
                let mut raw = raw.clone();
                calls.spawn(async move { raw.send(GET, unfinished_body("")).await });
            }
        }
        if all_come {
            app.wait_until_in_flight(connections * CALLS_PER_CONNECTION).await;
        } else {
            let rejected = with_timeout("a rejection", calls.join_next()).await.expect("one");
            assert_overloaded(
                read_rpc_result(rejected.expect("no panic").expect("a response")).await,
            );
        }
        calls.shutdown().await;
        app.wait_until_in_flight(0).await;
    }
}

#[tokio::test]
async fn reflection_streams_take_memory_for_what_they_buffer() {
    let app = App::start().await;
    let wire = app.raw_client().await;
    let mut open = Vec::new();
    let refused = loop {
        let mut wire = wire.clone();
        let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        let stream = wire.send(path, unfinished_body("")).await.expect("an answer");
        if stream.headers().contains_key("grpc-status") {
            break read_rpc_result(stream).await;
        }
        open.push(stream);
    };
    assert_overloaded(refused);
    // A client may have 64 streams that take less.
    assert!((1..64).contains(&open.len()), "{} streams", open.len());
}
