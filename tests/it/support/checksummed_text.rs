//! The text of personal access tokens and reset codes: bytes with a checksum, in base64url.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use flate2::Crc;

/// Returns the text of these bytes, with a valid checksum.
pub fn encode(prefix: &str, bytes: &[u8]) -> String {
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode([bytes, &checksum(bytes)].concat()))
}

/// Returns the bytes of a valid text, without the checksum.
pub fn decode(prefix: &str, text: &str) -> Vec<u8> {
    let mut bytes =
        URL_SAFE_NO_PAD.decode(text.strip_prefix(prefix).expect("the prefix")).expect("base64url");
    let sum = bytes.split_off(bytes.len() - 4);
    assert_eq!(sum, checksum(&bytes));
    bytes
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum().to_be_bytes()
}
