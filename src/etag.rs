//! Etags (AIP-154): a resource's version as callers see it, made from its counter.

/// What an update or delete says of the version it is meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guard {
    /// Any version.
    None,
    /// This version only.
    Version(i64),
}

impl Guard {
    /// Reads an etag from a request. One that this service did not make matches no
    /// version.
    #[must_use]
    pub fn parse(etag: &str) -> Self {
        if etag.is_empty() {
            return Self::None;
        }
        let version = etag.parse().ok().filter(|version| format(*version) == etag);
        Self::Version(version.unwrap_or(NO_VERSION))
    }

    /// For a statement: the version that the row must have, or none.
    #[must_use]
    pub fn version(self) -> Option<i64> {
        match self {
            Self::None => None,
            Self::Version(version) => Some(version),
        }
    }
}

/// The version of a new resource; each change adds one.
pub const FIRST_VERSION: i64 = 1;

/// No resource has this version.
const NO_VERSION: i64 = 0;

/// The etag of a version.
#[must_use]
pub fn format(version: i64) -> String {
    version.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_etag_names_its_version_in_one_spelling() {
        assert_eq!(Guard::parse(""), Guard::None);
        assert_eq!(Guard::parse(&format(7)), Guard::Version(7));
        for garbage in ["07", "+7", " 7", "7 ", "0", "-1", "x", "\"7\"", "99999999999999999999"] {
            let guard = Guard::parse(garbage);
            assert!(!matches!(guard, Guard::None | Guard::Version(1..)), "{garbage}: {guard:?}");
        }
    }

    proptest! {
        #[test]
        fn a_version_is_read_back(version in FIRST_VERSION..) {
            prop_assert_eq!(Guard::parse(&format(version)), Guard::Version(version));
        }

        #[test]
        fn only_an_etag_matches_a_version(etag in prop_oneof![any::<String>(), "[0-9+-]{1,21}"]) {
            match Guard::parse(&etag) {
                Guard::None => prop_assert_eq!(etag, ""),
                Guard::Version(version) if version >= FIRST_VERSION => {
                    prop_assert_eq!(etag, format(version));
                }
                Guard::Version(_) => {}
            }
        }
    }
}
