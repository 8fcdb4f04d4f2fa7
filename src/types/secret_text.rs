//! Values that an error must not show, because they may be secret.

use std::path::Path;

/// What stands for a value that may be secret.
pub const HIDDEN: &str = "(not shown)";

/// The length from which on a word of letters and digits may be a key: 32 bytes in any notation
/// are longer.
///
/// Test: `what_may_be_secret_is_not_shown`.
const MIN_KEY_LEN: usize = 32;

/// Returns `true` for a value that may be or contain a secret: a URL with a user or parameters, a
/// key in PEM, or a random word. Wherever an operator passes a value, it may be that of another
/// setting.
#[must_use]
pub fn may_be_secret(text: &str) -> bool {
    let is_of_key = |c: char| c.is_ascii_alphanumeric() || "+/=_-".contains(c);
    text.contains(['@', '?', '\n'])
        || text.contains("-----BEGIN")
        || (text.len() >= MIN_KEY_LEN && text.chars().all(is_of_key))
}

/// Returns the path of a setting for an error. The value of a variable `…_FILE` may be the
/// content of the file instead.
#[must_use]
pub fn display_path(path: &Path) -> String {
    let text = path.display().to_string();
    // An absolute path may have any characters. A key in base64 may start with a slash.
    let is_path = path.is_absolute() && !text.contains('\n') && !text.ends_with('=');
    if is_path || !may_be_secret(&text) {
        text
    } else {
        "(not shown: it must be a path, not the content of the file)".to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_secret_is_not_shown() {
        for secret in [
            "postgresql://app:hidden@db/app",
            "http://collector:4317/?api-key=hidden",
            "-----BEGIN PRIVATE KEY-----",
            "a\nb",
            "q83vEjRWeJq83vEjRWeJq83vEjRWeJq83vEjRWeJq8=",
            "0123456789abcdef0123456789abcdef",
        ] {
            assert!(may_be_secret(secret), "{secret}");
            assert!(!display_path(Path::new(secret)).contains(secret), "{secret}");
        }
        for other in [
            "",
            "localhost",
            &"a".repeat(MIN_KEY_LEN - 1),
            "http://collector:4318/v1/traces",
            "10.0.0.0/8,fd00::/8",
        ] {
            assert!(!may_be_secret(other), "{other}");
        }
    }

    #[test]
    fn a_path_is_shown() {
        for path in ["key", "secrets/key.pem", "/run/credentials/app@1.service/key", "/a?b"] {
            assert_eq!(display_path(Path::new(path)), path);
        }
        let key = "/83vEjRWeJq83vEjRWeJq83vEjRWeJq83vEjRWeJq8=";
        assert!(!display_path(Path::new(key)).contains(key));
    }
}
