//! Texts that the API has rules for.

/// Returns all control characters (Unicode's general category Cc).
pub fn control_characters() -> impl Iterator<Item = char> {
    ('\0'..='\u{1f}').chain('\u{7f}'..='\u{9f}')
}
