//! The operator's command, `fast-zero user`, beside a server.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use flate2::Crc;

use super::{App, postgres::TestDatabase, process::Binary};

/// Prepares `fast-zero user` with these arguments, on this database.
pub fn user_command(database: &TestDatabase, arguments: &[&str]) -> Binary {
    let binary = Binary::new(&[&["user"], arguments].concat());
    binary.env("DATABASE_URL", &database.url()).env("LOG_FORMAT", "json")
}

impl App {
    /// Runs `fast-zero user`, which must succeed. Returns what it writes to standard output.
    pub async fn operate(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = user_command(&self.database, arguments).outputs().await;
        assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
        stdout
    }

    /// Creates a reset code for a user.
    pub async fn reset_code(&self, name: &str) -> String {
        self.operate(&["reset-password", name]).await.trim_end().to_owned()
    }
}

/// Returns a reset code with these 48 bytes: the ID of the user, and the secret.
pub fn reset_code(bytes: &[u8]) -> String {
    let mut crc = Crc::new();
    crc.update(bytes);
    let bytes = [bytes, &crc.sum().to_be_bytes()].concat();
    format!("fzr_{}", URL_SAFE_NO_PAD.encode(bytes))
}

/// Returns a reset code that differs in a byte: 0 to 15 are the ID of the user, and 16 to 47 the
/// secret. The checksum matches, because anyone can compute it.
pub fn with_other_bytes(code: &str, at: usize) -> String {
    let encoded = code.strip_prefix("fzr_").expect("a code");
    let mut bytes = URL_SAFE_NO_PAD.decode(encoded).expect("base64url");
    bytes.truncate(48);
    bytes[at] ^= 1;
    reset_code(&bytes)
}
