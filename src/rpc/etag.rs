//! Etags (AIP-154): the version of a resource as callers see it.

/// The version that an update or delete requires (AIP-154, `If-Match` in HTTP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precondition {
    /// Any version.
    None,
    /// This version only.
    Version(i64),
}

impl Precondition {
    /// Parses the etag of a request. An etag that this service did not issue matches no
    /// version.
    #[must_use]
    pub fn parse(etag: &str) -> Self {
        if etag.is_empty() {
            return Self::None;
        }
        let version = etag.parse().ok().filter(|version| encode(*version) == etag);
        Self::Version(version.unwrap_or(NO_VERSION))
    }

    /// Returns the required version as a parameter of a statement.
    #[must_use]
    pub fn version(self) -> Option<i64> {
        match self {
            Self::None => None,
            Self::Version(version) => Some(version),
        }
    }
}

/// The version of a new user, to which each change adds one. The versions of todos are times, and
/// greater.
pub const INITIAL_VERSION: i64 = 1;

/// A version that no resource has.
const NO_VERSION: i64 = 0;

/// Returns the etag of a version.
#[must_use]
pub fn encode(version: i64) -> String {
    version.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_version_has_one_etag() {
        assert_eq!(Precondition::parse(""), Precondition::None);
        assert_eq!(Precondition::parse(&encode(7)), Precondition::Version(7));
        for garbage in ["07", "+7", " 7", "7 ", "0", "-1", "x", "\"7\"", "99999999999999999999"] {
            let precondition = Precondition::parse(garbage);
            let matches_none =
                !matches!(precondition, Precondition::None | Precondition::Version(1..));
            assert!(matches_none, "{garbage}: {precondition:?}");
        }
    }

    proptest! {
        #[test]
        fn an_etag_is_parsed_to_its_version(version in INITIAL_VERSION..) {
            prop_assert_eq!(Precondition::parse(&encode(version)), Precondition::Version(version));
        }

        #[test]
        fn only_an_etag_matches_a_version(etag in prop_oneof![any::<String>(), "[0-9+-]{1,21}"]) {
            match Precondition::parse(&etag) {
                Precondition::None => prop_assert_eq!(etag, ""),
                Precondition::Version(version) if version >= INITIAL_VERSION => {
                    prop_assert_eq!(etag, encode(version));
                }
                Precondition::Version(_) => {}
            }
        }
    }
}
