//! How much memory calls may reserve.

use hyper::body::Incoming;
use prost::Message;
use tokio::task::JoinSet;
use tonic::Code;

use super::{CREATE, GET, LIST, all, assert_overloaded, other_peer, signed_up_with_much};
use crate::support::{
    App,
    http2::length_prefixed,
    metrics::config_with_metrics as config,
    parallel::join_all,
    raw_client::{RawClient, full_body, read_rpc_result, unfinished_body},
    wait::with_timeout,
};

/// Asks so often for everything and reads nothing: the answers, and how many calls were
/// turned away.
async fn unread(wire: &RawClient, calls: usize) -> (Vec<http::Response<Incoming>>, usize) {
    let calls = (0..calls).map(|_| {
        let mut wire = wire.clone();
        async move { wire.send(LIST, full_body(length_prefixed(&all().encode_to_vec()))).await }
    });
    let (mut unread, mut refused) = (Vec::new(), 0);
    for response in join_all(calls).await {
        let response = response.expect("an answer");
        if response.headers().contains_key("grpc-status") {
            assert_overloaded(read_rpc_result(response).await);
            refused += 1;
        } else {
            unread.push(response);
        }
    }
    (unread, refused)
}

#[tokio::test]
async fn who_reads_nothing_leaves_room_for_others() {
    let app = App::start_with(config()).await;
    let ana = signed_up_with_much(&app).await;
    // Twice: what was taken comes back.
    for _ in 0..2 {
        let other = other_peer(&app, &ana).await;
        let (unread, refused) = unread(&other, 20).await;
        assert_eq!((unread.len(), refused), (12, 8));
        ana.list_todos(all()).await;
        drop((other, unread));
        app.wait_until_connections(1).await;
    }
}

#[tokio::test]
async fn requests_that_are_almost_whole_leave_room_for_others() {
    let app = App::start_with(config()).await;
    let ana = signed_up_with_much(&app).await;
    let mut large = length_prefixed(&vec![0; 1024 * 1024]);
    let last = large.pop().expect("a byte");
    for _ in 0..2 {
        let other = other_peer(&app, &ana).await;
        let mut calls = JoinSet::new();
        for _ in 0..12 {
            let (mut wire, almost) = (other.clone(), large.clone());
            calls.spawn(async move { wire.send(CREATE, unfinished_body(almost)).await });
        }
        let refused = with_timeout("a refusal", calls.join_next()).await.expect("one");
        let refused = refused.expect("no panic").expect("an answer");
        assert_overloaded(read_rpc_result(refused).await);
        ana.list_todos(all()).await;
        let mut wire = app.raw_client().await.with_token_of(&ana);
        let whole = full_body([&large[..], &[last]].concat());
        let read = wire.send(CREATE, whole).await.expect("an answer");
        let read = read_rpc_result(read).await.expect_err("no good request");
        assert_eq!(read.code(), Code::Internal, "read, and no to-do: {read:?}");
        calls.shutdown().await;
        drop(other);
        app.wait_until_in_flight(0).await;
    }
}

#[tokio::test]
async fn metadata_take_memory_as_messages_do() {
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
            let mut wire = other_peer(&app, &ana).await;
            for _ in 0..entries {
                wire = wire.with_metadata("a", "x".repeat(length));
            }
            for _ in 0..CALLS_PER_CONNECTION {
                let mut wire = wire.clone();
                calls.spawn(async move { wire.send(GET, unfinished_body("")).await });
            }
        }
        if all_come {
            app.wait_until_in_flight(connections * CALLS_PER_CONNECTION).await;
        } else {
            let refused = with_timeout("a refusal", calls.join_next()).await.expect("one");
            assert_overloaded(
                read_rpc_result(refused.expect("no panic").expect("an answer")).await,
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
