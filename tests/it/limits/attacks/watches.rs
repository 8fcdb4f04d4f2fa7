//! Attacks with watches of todos.

use std::io;

use tokio::time::sleep;

use super::{STEP, Target};
use crate::support::http2::{self, END_HEADERS, END_STREAM, RawHttp2, frame};

const WATCH: &str = "/fastzero.todo.v1.TodoService/WatchTodos";

/// More streams than a user may have watches, on each connection.
const WATCHES: u32 = 32;

impl Target {
    /// Takes the token of another user: the server limits the watches of one.
    fn with_token_of_watcher(mut self) -> Self {
        self.token = self.watchers[self.worker as usize / 2 % self.watchers.len()].clone();
        self
    }
}

/// Returns the frames that open a watch of all todos.
fn watch(target: &Target, sender: &mut RawHttp2) -> (u32, Vec<u8>) {
    let id = sender.next_stream_id();
    let mut frames = frame(http2::HEADERS, END_HEADERS, id, &target.call(WATCH, &[]));
    frames.extend(frame(http2::DATA, END_STREAM, id, &http2::length_prefixed(&[])));
    (id, frames)
}

/// Opens as many watches as the server admits, reads nothing, and opens further ones for those that
/// the server rejects or resets.
pub(super) async fn unread_watches(target: Target) -> io::Result<()> {
    let target = target.with_token_of_watcher();
    let mut sender = target.sender().await?;
    let window = if target.worker.is_multiple_of(2) { 0 } else { 1024 };
    let mut frames = http2::settings_frame(http2::INITIAL_WINDOW_SIZE, window);
    for _ in 0..WATCHES {
        frames.extend(watch(&target, &mut sender).1);
    }
    loop {
        sender.send(&frames).await?;
        target.count_step();
        frames = watch(&target, &mut sender).1;
        sleep(STEP * 5).await;
    }
}

/// Opens watches and resets them, at once, or when the server has started to read: 1,600 a second
/// in total.
pub(super) async fn watch_resets(target: Target) -> io::Result<()> {
    let target = target.with_token_of_watcher();
    let mut sender = target.sender().await?;
    loop {
        let (mut opened, mut resets) = (Vec::new(), Vec::new());
        for _ in 0..4 {
            let (id, frames) = watch(&target, &mut sender);
            opened.extend(frames);
            resets.extend(frame(http2::RST_STREAM, 0, id, &8_u32.to_be_bytes()));
        }
        sender.send(&opened).await?;
        if !target.worker.is_multiple_of(2) {
            sleep(STEP / 2).await;
        }
        sender.send(&resets).await?;
        target.count_step();
        sleep(STEP).await;
    }
}

/// Opens watches of a list of 1 MiB, and reads each byte by byte.
pub(super) async fn slow_watches(target: Target) -> io::Result<()> {
    let target = target.with_token_of_watcher();
    let mut sender = target.sender().await?;
    let (mut ids, mut opened) = (Vec::new(), http2::settings_frame(http2::INITIAL_WINDOW_SIZE, 1));
    for _ in 0..WATCHES {
        let (id, frames) = watch(&target, &mut sender);
        opened.extend(frames);
        ids.push(id);
    }
    sender.send(&opened).await?;
    loop {
        for id in &ids {
            sender.send(&frame(http2::WINDOW_UPDATE, 0, *id, &1_u32.to_be_bytes())).await?;
        }
        target.count_step();
        sleep(STEP * 10).await;
    }
}
