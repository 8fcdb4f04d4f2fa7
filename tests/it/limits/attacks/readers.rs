//! Attacks that do not read responses.

use std::{io, time::Duration};

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use prost::Message;
use tokio::{io::AsyncWriteExt, time::sleep};

use super::{LIST, STEP, STREAMS, Target, largest_batchable_page};
use crate::support::{
    http2::{self, END_HEADERS, END_STREAM, frame},
    raw_client::{RawClient, full_body},
};

/// Requests large responses and reads 1 KiB of them in intervals.
pub(super) async fn slow_readers(target: Target) -> io::Result<()> {
    read(target, 1024, Some(STEP)).await
}

/// Requests large responses and reads nothing.
pub(super) async fn unread_responses(target: Target) -> io::Result<()> {
    let window = if target.worker.is_multiple_of(2) { 0 } else { 1024 };
    read(target, window, None).await
}

/// Requests lists until the connection closes, and reads a frame after each pause, or none.
pub(super) async fn read(target: Target, window: u32, pause: Option<Duration>) -> io::Result<()> {
    let raw = target.raw_client(window).await?;
    let request = Bytes::from(http2::length_prefixed(&largest_batchable_page().encode_to_vec()));
    for _ in 0..STREAMS {
        let (mut raw, request, target) = (raw.clone(), request.clone(), target.clone());
        tokio::spawn(async move {
            loop {
                let response = raw.send(LIST, full_body(request.clone())).await;
                let Ok(mut response) = response else { return };
                target.count_step();
                read_slowly(response.body_mut(), pause).await;
                sleep(STEP * 10).await;
            }
        });
        sleep(STEP).await;
    }
    wait_until_closed(&raw).await;
    Ok(())
}

pub(super) async fn read_slowly(body: &mut Incoming, pause: Option<Duration>) {
    if hyper::body::Body::is_end_stream(body) {
        return;
    }
    let Some(pause) = pause else {
        return std::future::pending().await;
    };
    while let Some(Ok(_)) = body.frame().await {
        sleep(pause).await;
    }
}

pub(super) async fn wait_until_closed(raw: &RawClient) {
    while !raw.is_closed() {
        sleep(STEP * 10).await;
    }
}

/// Makes calls that fail immediately, and does not read the errors: 3,200 a second in total.
pub(super) async fn unread_errors(target: Target) -> io::Result<()> {
    let mut stream = http2::connect_without_reading(target.address, target.client_ip).await?;
    stream.write_all(http2::PREFACE).await?;
    let block = target.call("/no.Such/Method", &[]);
    let mut id = 1_u32;
    loop {
        let mut calls = Vec::new();
        for _ in 0..4 {
            calls.extend(frame(http2::HEADERS, END_HEADERS | END_STREAM, id, &block));
            id += 2;
        }
        stream.write_all(&calls).await?;
        target.count_step();
        sleep(STEP * 4).await;
    }
}

/// Requests descriptors and does not read them.
pub(super) async fn unread_reflection(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    sender.send(&http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 0)).await?;
    let block = target.call("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", &[]);
    let symbol = b"fastzero.todo.v1.TodoService";
    let request = [&[0x22, u8::try_from(symbol.len()).expect("short")], &symbol[..]].concat();
    let requests = http2::length_prefixed(&request).repeat(8);
    for _ in 0..STREAMS {
        let id = sender.next_stream_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, &block)).await?;
        sender.send(&frame(http2::DATA, 0, id, &requests)).await?;
        target.count_step();
    }
    sender.wait_until_closed().await;
    Ok(())
}
