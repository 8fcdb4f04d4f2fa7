//! The text of a random credential: a prefix, and base64url of its bytes and their CRC-32.
//!
//! A secret scanner finds such a text by the prefix and confirms it by the checksum. The server
//! rejects a text with a typo without a lookup. The checksum is no signature: anyone can compute
//! it.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use flate2::Crc;
use secrecy::SecretString;

/// The length of the checksum, in bytes.
const CHECKSUM_BYTES: usize = 4;

/// Returns the text of the parts, in this order.
#[must_use]
pub fn encode(prefix: &str, parts: &[&[u8]]) -> SecretString {
    let mut bytes = parts.concat();
    bytes.extend(checksum(&bytes));
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(bytes)).into()
}

/// Returns the bytes of a text. Returns `None` if the prefix, the length or the checksum is wrong,
/// and for any other spelling of the same bytes (RFC 4648, section 3.5).
#[must_use]
pub fn decode<const N: usize>(prefix: &str, text: &str) -> Option<[u8; N]> {
    let encoded = text.strip_prefix(prefix)?;
    // The length comes first, so that a long text costs nothing.
    if encoded.len() != base64::encoded_len(N + CHECKSUM_BYTES, false)? {
        return None;
    }
    let decoded = URL_SAFE_NO_PAD.decode(encoded).ok()?;
    let (bytes, sum) = decoded.split_first_chunk::<N>()?;
    (*sum == checksum(bytes)).then_some(*bytes)
}

/// Returns the CRC-32 (IEEE 802.3), in network byte order.
fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum().to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use secrecy::ExposeSecret;

    use super::*;

    const PREFIX: &str = "fz_";

    fn text(bytes: &[u8]) -> String {
        encode(PREFIX, &[bytes]).expose_secret().to_owned()
    }

    #[test]
    fn the_checksum_is_that_of_ieee() {
        // The check value of CRC-32/ISO-HDLC in the catalog of CRC algorithms.
        assert_eq!(checksum(b"123456789"), 0xcbf4_3926_u32.to_be_bytes());
    }

    #[test]
    fn a_text_has_the_prefix_and_one_length() {
        let text = text(&[7; 64]);
        assert!(text.starts_with(PREFIX), "{text}");
        assert_eq!(text.len(), 3 + 91);
        assert_eq!(decode(PREFIX, &text), Some([7; 64]));
        assert_eq!(decode::<64>("fzr_", &text), None, "of another kind");
        assert_eq!(decode::<64>("", &text), None);
        assert_eq!(decode::<63>(PREFIX, &text), None);
        assert_eq!(decode::<64>(PREFIX, ""), None);
    }

    #[test]
    fn the_bits_that_no_byte_uses_are_zero() {
        let text = text(&[0; 64]);
        let (start, last) = text.split_at(text.len() - 1);
        let spellings = ('0'..='z').filter(char::is_ascii_alphanumeric);
        let accepted: Vec<_> = spellings
            .filter(|char| decode::<64>(PREFIX, &format!("{start}{char}")).is_some())
            .collect();
        assert_eq!(accepted, last.chars().collect::<Vec<_>>());
        assert_eq!(decode::<64>(PREFIX, &format!("{text}=")), None, "padding");
    }

    proptest! {
        #[test]
        fn an_encoded_text_decodes_to_its_bytes(bytes: [u8; 32], other: [u8; 16]) {
            let text = encode("fzr_", &[&other, &bytes]);
            let decoded = decode::<48>("fzr_", text.expose_secret()).expect("our own text");
            prop_assert_eq!((&decoded[..16], &decoded[16..]), (&other[..], &bytes[..]));
        }

        #[test]
        fn a_text_with_another_byte_is_rejected(
            bytes: [u8; 32], at in 0_usize..51, other in "\\PC"
        ) {
            let mut chars: Vec<_> = text(&bytes).chars().map(String::from).collect();
            prop_assume!(chars[at] != other);
            chars[at] = other;
            prop_assert_eq!(decode::<32>(PREFIX, &chars.concat()), None);
        }

        #[test]
        fn a_text_of_another_length_is_rejected(
            bytes: [u8; 32], len in 0_usize..51, more in "[A-Za-z0-9_=-]{1,4}"
        ) {
            let text = text(&bytes);
            prop_assert_eq!(decode::<32>(PREFIX, &text[..len]), None);
            prop_assert_eq!(decode::<32>(PREFIX, &format!("{text}{more}")), None);
        }

        #[test]
        fn garbage_is_rejected(
            text in prop_oneof![any::<String>(), "fz_[A-Za-z0-9_-]{46,50}", "fz_\\PC{0,48}"]
        ) {
            prop_assert_eq!(decode::<32>(PREFIX, &text), None);
        }
    }
}
