//! Attacks with connections and handshakes.

use std::io;

use tokio::io::AsyncWriteExt;

use super::Target;
use crate::support::http2::{self};

/// Four times as many connections as one address may have, which are closed at once and come
/// again: 7 000 a second from all together.
pub(super) async fn excess_connections(target: Target) -> io::Result<()> {
    say(&target, http2::PREFACE).await
}

/// Connections that say nothing, half of what they should, or nonsense.
pub(super) async fn half_open_connections(target: Target) -> io::Result<()> {
    let said = [&b""[..], &http2::PREFACE[..14], b"\x16\x03\x01\x02\x00\x01", http2::PREFACE];
    say(&target, said[target.worker as usize % said.len()]).await
}

/// Half of a handshake of TLS: nothing, a little, or the most that may come before its end.
pub(super) async fn half_open_handshakes(target: Target) -> io::Result<()> {
    let mut long = b"\x16\x03\x01\x40\x00\x01\x00\xff\xff".to_vec();
    long.resize(5 + 0x4000, 0);
    let more = [b"\x16\x03\x01\x40\x00".to_vec(), vec![0; 0x4000]].concat();
    let longest = [&long[..], &more, &more, &more[..more.len() - 100]].concat();
    let said = [b"", &b"\x16\x03\x01\x02\x00\x01"[..], &long, &longest];
    say(&target, said[target.worker as usize % said.len()]).await
}

/// Says this on a connection, and waits for its end.
pub(super) async fn say(target: &Target, said: &[u8]) -> io::Result<()> {
    let mut stream = http2::connect_from(target.address, target.peer).await?;
    stream.write_all(said).await?;
    target.done();
    let (mut read, _write) = stream.split();
    tokio::io::copy(&mut read, &mut tokio::io::sink()).await.map(drop)
}
