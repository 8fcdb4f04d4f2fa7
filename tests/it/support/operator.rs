//! The operator's command, `fast-zero user`, beside a server.

use super::{
    App,
    checksummed_text::{decode, encode},
    postgres::TestDatabase,
    process::Binary,
};

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
    encode("fzr_", bytes)
}

/// Returns a reset code that differs in a byte: 0 to 15 are the ID of the user, and 16 to 47 the
/// secret. The checksum matches, because anyone can compute it.
pub fn with_other_bytes(code: &str, at: usize) -> String {
    let mut bytes = decode("fzr_", code);
    bytes[at] ^= 1;
    reset_code(&bytes)
}
