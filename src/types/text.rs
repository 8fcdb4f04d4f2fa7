//! Validation of texts from clients: NFC, then trimming of whitespace, then the length in
//! characters. Control characters are rejected before trimming.

use std::{borrow::Cow, ops::RangeInclusive};

use unicase::UniCase;
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfc_quick};

use crate::types::invalid::InvalidValue;

/// The number of lines that a text may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineMode {
    /// No control characters at all.
    Single,
    /// Line breaks (CRLF becomes LF) and tabs, but no other control characters.
    Multi,
}

/// Parses a text by the rules of this module.
pub fn parse(
    raw: &str,
    mode: LineMode,
    length: RangeInclusive<usize>,
) -> Result<String, InvalidValue> {
    let raw = normalize_line_breaks(raw, mode);
    reject_control_chars(&raw, mode)?;
    let text = nfc(&raw);
    let text = text.trim();
    check_length(text, length)?;
    Ok(text.to_owned())
}

/// Parses a text to search for, by the rules of this module but without trimming, and folds
/// its case. Returns `None` if the text is empty, which matches everything.
pub fn parse_filter(raw: &str, mode: LineMode, max: usize) -> Result<Option<String>, InvalidValue> {
    let raw = normalize_line_breaks(raw, mode);
    reject_control_chars(&raw, mode)?;
    let text = nfc(&raw);
    check_length(&text, 0..=max)?;
    Ok((!text.is_empty()).then(|| fold_case(&text)))
}

/// Returns the text in normalization form C (UAX #15), in which canonically equivalent texts
/// are equal.
#[must_use]
pub fn nfc(text: &str) -> Cow<'_, str> {
    match is_nfc_quick(text.chars()) {
        IsNormalized::Yes => Cow::Borrowed(text),
        IsNormalized::No | IsNormalized::Maybe => Cow::Owned(text.nfc().collect()),
    }
}

/// Returns the case-folded text, for case-insensitive comparison (Unicode's full case
/// folding, then NFC). Does not use the database, so the result is independent of its
/// locale.
#[must_use]
pub fn fold_case(text: &str) -> String {
    let folded = UniCase::unicode(text).to_folded_case();
    match nfc(&folded) {
        Cow::Borrowed(_) => folded,
        Cow::Owned(normalized) => normalized,
    }
}

/// Rejects control characters (Unicode's general category Cc).
pub fn reject_control_chars(text: &str, mode: LineMode) -> Result<(), InvalidValue> {
    let (allowed, message): (&[char], _) = match mode {
        LineMode::Single => (&[], "must not contain control characters"),
        LineMode::Multi => {
            (&['\n', '\t'], "must not contain control characters but line breaks and tabs")
        }
    };
    if text.chars().any(|char| char.is_control() && !allowed.contains(&char)) {
        return Err(InvalidValue::new(message));
    }
    Ok(())
}

/// Checks the length in characters (Unicode scalar values).
pub fn check_length(text: &str, length: RangeInclusive<usize>) -> Result<(), InvalidValue> {
    let (min, max) = (*length.start(), *length.end());
    if length.contains(&text.chars().count()) {
        return Ok(());
    }
    Err(match min {
        0 => format!("must have at most {max} characters").into(),
        _ => format!("must have {min} to {max} characters").into(),
    })
}

fn normalize_line_breaks(raw: &str, mode: LineMode) -> Cow<'_, str> {
    if mode == LineMode::Multi && raw.contains("\r\n") {
        Cow::Owned(raw.replace("\r\n", "\n"))
    } else {
        Cow::Borrowed(raw)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn folding_removes_case_and_nothing_else() {
        for (one, other) in [
            ("Ç", "ç"),
            ("STRASSE", "straße"),
            ("ΟΔΟΣ", "οδος"),
            ("ΟΔΟΣ", "οδοσ"),
            ("É", "e\u{301}"),
            ("ẞ", "ss"),
        ] {
            assert_eq!(fold_case(&nfc(one)), fold_case(&nfc(other)), "{one} {other}");
        }
        for (one, other) in [("e", "é"), ("i", "ı"), ("a b", "a  b"), ("🦀", "🦞")] {
            assert_ne!(fold_case(one), fold_case(other), "{one} {other}");
        }
    }

    #[test]
    fn control_characters_are_rejected_before_trimming() {
        for text in ["a\n", "\ta", "a\0b", "a\u{7f}", "\u{85}a", "a\rb", "a\r\n"] {
            assert!(parse(text, LineMode::Single, 1..=10).is_err(), "{text:?}");
        }
        for text in ["a\0b", "a\rb", "a\u{b}", "\u{85}"] {
            assert!(parse(text, LineMode::Multi, 0..=10).is_err(), "{text:?}");
        }
        let text = parse(" a\r\n\tb\n", LineMode::Multi, 0..=10);
        assert_eq!(text.as_deref(), Ok("a\n\tb"));
    }

    #[test]
    fn length_is_counted_in_characters_after_normalizing_and_trimming() {
        let crabs = "🦀".repeat(10);
        assert_eq!(parse(&crabs, LineMode::Single, 1..=10).as_deref(), Ok(&*crabs));
        assert!(parse(&"🦀".repeat(11), LineMode::Single, 1..=10).is_err());
        // Two characters become one.
        assert_eq!(parse("e\u{301}", LineMode::Single, 1..=1).as_deref(), Ok("é"));
        assert_eq!(parse("\u{3000} a \u{a0}", LineMode::Single, 1..=1).as_deref(), Ok("a"));
        assert!(parse("\u{2003} ", LineMode::Single, 1..=10).is_err());
    }

    proptest! {
        #[test]
        fn parsing_is_idempotent(text in "\\PC{0,40}") {
            if let Ok(once) = parse(&text, LineMode::Single, 1..=200) {
                prop_assert_eq!(parse(&once, LineMode::Single, 1..=200), Ok(once));
            }
        }

        #[test]
        fn accepted_texts_follow_the_rules(
            text in prop_oneof![any::<String>(), "[a\u{301}é \u{3000}\u{2000}\r\n\t\0]{0,8}"],
            multi_line: bool, min in 0_usize..3, max in 3_usize..12,
        ) {
            let (mode, allowed) =
                if multi_line { (LineMode::Multi, "\n\t") } else { (LineMode::Single, "") };
            if let Ok(text) = parse(&text, mode, min..=max) {
                let is_disallowed = |char: char| char.is_control() && !allowed.contains(char);
                prop_assert!(!text.contains(is_disallowed));
                prop_assert_eq!(text.trim(), &text);
                prop_assert_eq!(text.nfc().collect::<String>(), &*text);
                prop_assert!((min..=max).contains(&text.chars().count()));
                prop_assert_eq!(parse(&text, mode, min..=max), Ok(text));
            }
        }

        #[test]
        fn filters_are_normalized_like_texts(
            text in prop_oneof![any::<String>(), "[a\u{301}é \r\n\t\0]{0,8}"], multi_line: bool
        ) {
            let mode = if multi_line { LineMode::Multi } else { LineMode::Single };
            let stored = parse(&text, mode, 0..=200);
            match parse_filter(&text, mode, 200) {
                // The filter is not trimmed, so it may be longer than the stored text.
                Ok(filter) => {
                    let filter = filter.unwrap_or_default();
                    prop_assert!(filter.contains(&fold_case(&stored.expect("it fits"))));
                }
                Err(_) => prop_assert!(
                    stored.is_err() || nfc(&text).chars().count() > 200,
                    "{text:?}"
                ),
            }
        }

        #[test]
        fn folding_is_idempotent(text in "\\PC{0,40}") {
            let once = fold_case(&nfc(&text));
            prop_assert_eq!(fold_case(&once), once);
        }

        #[test]
        fn substring_matches_ignore_case(
            before in "[a-zA-Zéßſ]{0,8}", needle in "[a-zA-ZçÇ]{1,8}", after in "[a-zA-Z]{0,8}"
        ) {
            let text = fold_case(&format!("{before}{needle}{after}"));
            prop_assert!(text.contains(&fold_case(&needle.to_uppercase())));
            prop_assert!(text.contains(&fold_case(&needle.to_lowercase())));
        }
    }
}
