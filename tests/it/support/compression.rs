//! Messages that are compressed with gzip.

use std::io::{Read, Write};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};

/// Compresses bytes.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).expect("written to memory");
    encoder.finish().expect("written to memory")
}

/// Decompresses bytes.
pub fn gunzip(bytes: &[u8]) -> Vec<u8> {
    let mut decompressed = Vec::new();
    GzDecoder::new(bytes).read_to_end(&mut decompressed).expect("gzip");
    decompressed
}

/// Encodes a length-prefixed message with the flag of compressed messages.
pub fn flagged(bytes: &[u8]) -> Vec<u8> {
    let mut message = super::http2::length_prefixed(bytes);
    message[0] = 1;
    message
}
