//! The signing keys of access tokens: a pair of Ed25519 keys for each month.
//!
//! A key follows from the secret and the month, so that all replicas have the same keys without a
//! table, a leader or a job.

use std::fmt;

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{Ed25519KeyPair, KeyPair},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{DecodingKey, EncodingKey};
use time::{OffsetDateTime, UtcOffset};

use super::keys::SecretKey;

/// The first part of the HKDF info. The month follows, as `YYYY-MM`.
const LABEL: &[u8] = b"ed25519";

/// A calendar month in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Month {
    /// The months since January of the year 0.
    number: i32,
}

impl Month {
    /// Returns the month of a time.
    #[must_use]
    pub fn at(time: OffsetDateTime) -> Self {
        let date = time.to_offset(UtcOffset::UTC).date();
        Self { number: date.year() * 12 + i32::from(u8::from(date.month())) - 1 }
    }

    /// Returns the months whose keys verify in this month: the previous month, this month and the
    /// next month.
    #[must_use]
    pub fn verifying(self) -> [Self; 3] {
        [-1, 0, 1].map(|offset| Self { number: self.number + offset })
    }

    /// Returns `true` if the key of this month verifies in the `current` month.
    #[must_use]
    pub fn verifies_in(self, current: Self) -> bool {
        current.verifying().contains(&self)
    }
}

/// Formats the month as `YYYY-MM`.
impl fmt::Display for Month {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:04}-{:02}", self.number.div_euclid(12), self.number.rem_euclid(12) + 1)
    }
}

/// The public half of a key, with the members of a JWK (RFC 7517, RFC 8037).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    /// The ID of the key: its JWK thumbprint (RFC 7638; RFC 8037, appendix A.3).
    pub kid: String,
    /// The key, in base64url.
    pub x: String,
}

impl PublicKey {
    /// The key type.
    pub const KTY: &'static str = "OKP";
    /// The curve.
    pub const CRV: &'static str = "Ed25519";
    /// The signature algorithm.
    pub const ALG: &'static str = "EdDSA";
    /// The use of the key: signatures.
    pub const USE: &'static str = "sig";

    fn new(bytes: &[u8]) -> Self {
        let x = URL_SAFE_NO_PAD.encode(bytes);
        let members = format!(r#"{{"crv":"{}","kty":"{}","x":"{x}"}}"#, Self::CRV, Self::KTY);
        Self { kid: URL_SAFE_NO_PAD.encode(digest(&SHA256, members.as_bytes())), x }
    }
}

/// The key pair of a month.
#[derive(Clone)]
pub struct MonthKey {
    /// The month in which the key signs.
    pub month: Month,
    /// The public key, as it is published.
    pub public: PublicKey,
    /// The private key.
    pub signing: EncodingKey,
    /// The public key.
    pub verification: DecodingKey,
}

impl MonthKey {
    /// Derives the key of a month. The seed of Ed25519 is HKDF-SHA256 of the secret, with
    /// `ed25519` and the month as info.
    #[must_use]
    pub fn derive(secret: &SecretKey, month: Month) -> Self {
        Self::from_seed(&secret.expand(&[LABEL, month.to_string().as_bytes()]), month)
            .expect("any 32 bytes are a seed of Ed25519")
    }

    fn from_seed(seed: &[u8], month: Month) -> Option<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
        let public = pair.public_key().as_ref();
        Some(Self {
            month,
            public: PublicKey::new(public),
            signing: EncodingKey::from_ed_der(pair.to_pkcs8v1().ok()?.as_ref()),
            verification: DecodingKey::from_ed_der(public),
        })
    }
}

impl fmt::Debug for MonthKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("MonthKey").field("kid", &self.public.kid).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    /// The time, the month, the public key and its ID.
    const VECTORS: [(OffsetDateTime, &str, &str, &str); 3] = [
        (
            datetime!(2026-11-29 12:00 UTC),
            "2026-11",
            "8SvxuY1Idq3s96xcVowVl-gKM6hclw184a17cJ7RshI",
            "IFH-UItMMmcJuKNcTkcWHgBZZvswORnpxU5OuT1JXfc",
        ),
        (
            datetime!(2026-12-31 23:59:59 UTC),
            "2026-12",
            "KEtLLcqNJujw0v1x-iJ0UxAqFu5ADbSSj7nhafAkwfY",
            "7LUwIHtuKma4pmXmp16UlaCH9qeGwBlOppdYA3AQWxY",
        ),
        (
            datetime!(2027-01-01 00:00 UTC),
            "2027-01",
            "UrkaP8JYFx0byYDiK4tjCng8kA6j5gxSsauwooXA2Fk",
            "u_82hyzcSSHkmfzePxEAhiQoSx6KgVETluf7sxiJH08",
        ),
    ];

    fn key(secret: &str, now: OffsetDateTime) -> MonthKey {
        MonthKey::derive(&SecretKey::new(secret.into()).expect("long enough"), Month::at(now))
    }

    #[test]
    fn months_follow_the_calendar_in_utc() {
        for (time, months) in [
            (datetime!(2026-11-29 23:59:59.999999 UTC), ["2026-10", "2026-11", "2026-12"]),
            (datetime!(2026-12-31 23:59:59.999999 UTC), ["2026-11", "2026-12", "2027-01"]),
            (datetime!(2027-01-01 00:00 UTC), ["2026-12", "2027-01", "2027-02"]),
            (datetime!(2027-01-01 00:30 +1), ["2026-11", "2026-12", "2027-01"]),
        ] {
            assert_eq!(Month::at(time).verifying().map(|month| month.to_string()), months);
        }
    }

    #[test]
    fn a_key_verifies_in_its_month_and_in_the_months_around_it() {
        let key = Month::at(datetime!(2026-12-15 00:00 UTC));
        for (now, verifies) in [
            (datetime!(2026-10-31 23:59:59 UTC), false),
            (datetime!(2026-11-01 00:00 UTC), true),
            (datetime!(2026-12-01 00:00 UTC), true),
            (datetime!(2027-01-31 23:59:59 UTC), true),
            (datetime!(2027-02-01 00:00 UTC), false),
            (datetime!(2027-12-15 00:00 UTC), false),
        ] {
            assert_eq!(key.verifies_in(Month::at(now)), verifies, "{now}");
        }
    }

    /// The expected values are those of Python's `cryptography` and `hashlib`:
    /// `HKDF(SHA256(), 32, salt=None, info=b"ed25519" + month)`,
    /// `Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()`, and SHA-256
    /// of `{"crv":"Ed25519","kty":"OKP","x":"…"}`.
    #[test]
    fn the_key_of_a_month_is_that_of_the_test_vectors() {
        let secret = "0123456789abcdef0123456789abcdef";
        for (now, month, x, kid) in VECTORS {
            let key = key(secret, now);
            assert_eq!(key.month.to_string(), month);
            assert_eq!(key.public, PublicKey { kid: kid.to_owned(), x: x.to_owned() });
        }
    }

    /// RFC 8037, appendices A.1 and A.3.
    #[test]
    fn the_key_id_is_the_thumbprint() {
        let seed = URL_SAFE_NO_PAD.decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A");
        let month = Month::at(datetime!(2026-12-01 00:00 UTC));
        let key = MonthKey::from_seed(&seed.expect("base64url"), month).expect("a seed");
        assert_eq!(key.public.x, "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo");
        assert_eq!(key.public.kid, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn keys_differ_by_secret_and_month_and_show_no_secret() {
        let (november, december) =
            (datetime!(2026-11-01 00:00 UTC), datetime!(2026-12-01 00:00 UTC));
        let (one, other) = ("a".repeat(32), "b".repeat(32));
        let keys = [key(&one, november), key(&one, december), key(&other, november)];
        assert_ne!(keys[0].public, keys[1].public);
        assert_ne!(keys[0].public, keys[2].public);
        let debug = format!("{:?}", keys[0]);
        assert_eq!(debug, format!("MonthKey {{ kid: {:?}, .. }}", keys[0].public.kid));
    }
}
