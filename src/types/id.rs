//! IDs: UUIDv7 (RFC 9562, section 5.7), one type for each kind of resource.

use std::{fmt, sync::Mutex};

use time::OffsetDateTime;
use uuid::{ContextV7, Timestamp, Uuid, fmt::Hyphenated};

use crate::types::{clock::Clock, invalid::InvalidValue};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// Generates an ID that is greater than all IDs this process generated before.
            #[must_use]
            pub fn generate(clock: &Clock) -> Self {
                Self(generate(clock))
            }

            /// Generates an ID for a test that does not care about the time.
            #[cfg(test)]
            pub fn any() -> Self {
                Self::generate(&Clock::default())
            }

            /// Parses the canonical form of an ID: lowercase with hyphens.
            pub fn parse(text: &str) -> Result<Self, InvalidValue> {
                parse(text).map(Self)
            }

            /// Wraps an ID from the database.
            #[must_use]
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// Returns the ID as the database stores it.
            #[must_use]
            pub const fn as_uuid(self) -> Uuid {
                self.0
            }

            /// Returns the time when the ID was generated, with millisecond precision.
            #[must_use]
            pub fn create_time(self) -> OffsetDateTime {
                create_time(self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(formatter)
            }
        }
    };
}

id! {
    /// The ID of a user.
    UserId
}
id! {
    /// The ID of a user's session.
    SessionId
}
id! {
    /// The ID of a user's personal access token.
    PersonalAccessTokenId
}
id! {
    /// The ID of a todo.
    TodoId
}

/// Orders the IDs of one process, also if the clock is set back.
static SEQUENCE: Mutex<ContextV7> = Mutex::new(ContextV7::new());

fn generate(clock: &Clock) -> Uuid {
    let nanoseconds = clock.now().unix_timestamp_nanos().max(0);
    let seconds = u64::try_from(nanoseconds / 1_000_000_000).unwrap_or(u64::MAX);
    let subsecond = u32::try_from(nanoseconds % 1_000_000_000).unwrap_or_default();
    Uuid::new_v7(Timestamp::from_unix(&SEQUENCE, seconds, subsecond))
}

fn parse(text: &str) -> Result<Uuid, InvalidValue> {
    const ALLOWED: InvalidValue =
        InvalidValue::new("must be a UUID in lower case with hyphens, as the service made it");

    let uuid = Uuid::try_parse(text).map_err(|_| ALLOWED)?;
    let mut buffer = [0; Hyphenated::LENGTH];
    if uuid.hyphenated().encode_lower(&mut buffer) == text { Ok(uuid) } else { Err(ALLOWED) }
}

/// Returns the Unix epoch for UUIDs without a timestamp, which this service does not
/// generate.
fn create_time(uuid: Uuid) -> OffsetDateTime {
    let (seconds, nanoseconds) = uuid.get_timestamp().map_or((0, 0), |time| time.to_unix());
    let nanoseconds = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_are_ascending_and_contain_their_creation_time() {
        let before = OffsetDateTime::now_utc();
        let ids: Vec<_> = (0..10_000).map(|_| TodoId::generate(&Clock::default())).collect();
        assert!(ids.is_sorted_by(|a, b| a < b));
        let age = ids[0].create_time() - before;
        assert!(age.whole_milliseconds().abs() < 1_000, "{age}");
    }

    #[test]
    fn ids_have_one_canonical_form() {
        let id = TodoId::generate(&Clock::default());
        let text = id.to_string();
        assert_eq!(TodoId::parse(&text), Ok(id));
        let simple = text.replace('-', "");
        let braced = format!("{{{text}}}");
        let urn = format!("urn:uuid:{text}");
        let upper = text.to_uppercase();
        let padded = format!(" {text}");
        for other in ["", "me", "1", &simple, &braced, &urn, &upper, &padded, "٣"] {
            assert!(TodoId::parse(other).is_err(), "{other}");
        }
    }

    proptest! {
        #[test]
        fn formatted_ids_parse_back(number: u128) {
            let id = TodoId::from_uuid(Uuid::from_u128(number));
            prop_assert_eq!(TodoId::parse(&id.to_string()), Ok(id));
            // Must not panic for an ID without a timestamp.
            let _ = id.create_time();
        }

        #[test]
        fn accepted_ids_are_in_canonical_form(
            text in prop_oneof![any::<String>(), "[0-9a-fA-F{}:urnid-]{32,45}",
                "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"]
        ) {
            if let Ok(id) = TodoId::parse(&text) {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
