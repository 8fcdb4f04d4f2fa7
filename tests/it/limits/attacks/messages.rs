//! Attacks with request messages.

use std::{io, sync::LazyLock};

use hyper::body::Bytes;
use tokio::time::sleep;

use super::{CREATE, STEP, STREAMS, Target, readers::wait_until_closed};
use crate::support::{
    compression::{flagged, gzip},
    http2::{self, END_HEADERS, frame},
    raw_client::{full_body, unfinished_body},
};

/// Sends messages far above the limit, with a length prefix that is larger still or at the
/// limit.
pub(super) async fn oversized_messages(target: Target) -> io::Result<()> {
    let mut raw = target.raw_client(None).await?;
    let mut giant = vec![0xff; 4 * 1024 * 1024];
    let promised: u32 = if target.worker.is_multiple_of(2) { u32::MAX } else { 1024 * 1024 };
    giant[..5].copy_from_slice(&[&[0][..], &promised.to_be_bytes()].concat());
    let giant = Bytes::from(giant);
    loop {
        let response = raw.send(CREATE, full_body(giant.clone())).await;
        response.map_err(io::Error::other)?;
        target.count_step();
        sleep(STEP * 5).await;
    }
}

/// Compressed messages that are at the limit after decompression, and above it. The server stops
/// at the limit, so a larger one is no worse.
pub(super) static BOMBS: LazyLock<[Bytes; 2]> =
    LazyLock::new(|| [1, 2].map(|mib| flagged(&gzip(&vec![0; mib * 1024 * 1024])).into()));

/// Sends decompression bombs.
pub(super) async fn decompression_bombs(target: Target) -> io::Result<()> {
    let mut raw = target.raw_client(None).await?.with_metadata("grpc-encoding", "gzip");
    loop {
        let bomb = &BOMBS[usize::from(target.worker.is_multiple_of(2))];
        let response = raw.send(CREATE, full_body(bomb.clone())).await;
        response.map_err(io::Error::other)?;
        target.count_step();
        sleep(STEP).await;
    }
}

/// Sends messages that end before their length.
pub(super) async fn truncated_messages(target: Target) -> io::Result<()> {
    let mut raw = target.raw_client(None).await?;
    loop {
        let cut = Bytes::from_static(b"\0\0\0\xff\xff\x0a\x05");
        raw.send(CREATE, full_body(cut)).await.map_err(io::Error::other)?;
        target.count_step();
        sleep(STEP).await;
    }
}

/// Sends messages of the maximum size without their last byte.
pub(super) async fn incomplete_requests(target: Target) -> io::Result<()> {
    let raw = target.raw_client(None).await?;
    let mut message = http2::length_prefixed(&vec![0; 1024 * 1024]);
    message.pop();
    let message = Bytes::from(message);
    for _ in 0..STREAMS {
        let (mut raw, message, target) = (raw.clone(), message.clone(), target.clone());
        tokio::spawn(async move {
            let response = raw.send(CREATE, unfinished_body(message)).await;
            target.count_step();
            drop(response);
        });
    }
    wait_until_closed(&raw).await;
    Ok(())
}

/// Sends requests byte by byte.
pub(super) async fn slow_senders(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(CREATE, &[]);
    let ids: Vec<_> = (0..STREAMS).map(|_| sender.next_stream_id()).collect();
    for id in &ids {
        sender.send(&frame(http2::HEADERS, END_HEADERS, *id, &block)).await?;
        sender.send(&frame(http2::DATA, 0, *id, &[0, 0, 0, 0xff, 0xff])).await?;
    }
    loop {
        for id in &ids {
            sender.send(&frame(http2::DATA, 0, *id, b"x")).await?;
        }
        target.count_step();
        sleep(STEP * 10).await;
    }
}
