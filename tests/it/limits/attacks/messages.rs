//! Attacks with request messages.

use std::io;

use hyper::body::Bytes;
use tokio::time::sleep;

use super::{CREATE, STEP, STREAMS, Target, readers::wait_until_closed};
use crate::support::{
    http2::{self, END_HEADERS, frame},
    raw_client::{full_body, unfinished_body},
};

/// Messages far larger than they may be, which promise to be larger still, or to be as large
/// as they may be.
pub(super) async fn oversized_messages(target: Target) -> io::Result<()> {
    let mut wire = target.raw_client(None).await?;
    let mut giant = vec![0xff; 4 * 1024 * 1024];
    let promised: u32 = if target.worker.is_multiple_of(2) { u32::MAX } else { 1024 * 1024 };
    giant[..5].copy_from_slice(&[&[0][..], &promised.to_be_bytes()].concat());
    let giant = Bytes::from(giant);
    loop {
        let answer = wire.send(CREATE, full_body(giant.clone())).await;
        answer.map_err(io::Error::other)?;
        target.done();
        sleep(STEP * 5).await;
    }
}

/// Messages that end before their length.
pub(super) async fn truncated_messages(target: Target) -> io::Result<()> {
    let mut wire = target.raw_client(None).await?;
    loop {
        let cut = Bytes::from_static(b"\0\0\0\xff\xff\x0a\x05");
        wire.send(CREATE, full_body(cut)).await.map_err(io::Error::other)?;
        target.done();
        sleep(STEP).await;
    }
}

/// The largest messages, but for their last byte.
pub(super) async fn incomplete_requests(target: Target) -> io::Result<()> {
    let wire = target.raw_client(None).await?;
    let mut message = http2::length_prefixed(&vec![0; 1024 * 1024]);
    message.pop();
    let message = Bytes::from(message);
    for _ in 0..STREAMS {
        let (mut wire, message, target) = (wire.clone(), message.clone(), target.clone());
        tokio::spawn(async move {
            let answer = wire.send(CREATE, unfinished_body(message)).await;
            target.done();
            drop(answer);
        });
    }
    wait_until_closed(&wire).await;
    Ok(())
}

/// Requests that come byte by byte.
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
        target.done();
        sleep(STEP * 10).await;
    }
}
