//! Email addresses: their validation and their comparison.
//!
//! An international domain has several spellings (`straße.de`, `STRASSE.de` and
//! `xn--strae-oqa.de`). [`Email`] holds one of them, the Unicode form of UTS 46 without
//! transitional processing, which distinguishes `straße.de` from `strasse.de`. Rows of version
//! 0.1.0, which compares addresses by case alone, may have another one, and no migration rewrites
//! them. [`EmailKey`] finds these rows, too.

use email_address::{EmailAddress, Options};
use idna::{
    AsciiDenyList,
    uts46::{DnsLength, Hyphens, Uts46},
};

use super::{
    invalid::InvalidValue,
    text::{self, LineMode, fold_case},
};

/// The maximum length of an email address, in characters (RFC 5321, section 4.5.3.1.3,
/// without the angle brackets).
///
/// Test: `all_invalid_fields_of_a_sign_up_are_reported`.
pub const MAX_EMAIL_LENGTH: usize = 254;

/// A plain email address (RFC 5321, with the international characters of RFC 6531).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Parses an address. Trims it and converts its domain to the Unicode form of UTS 46.
    pub fn parse(raw: &str) -> Result<Self, InvalidValue> {
        const ALLOWED: InvalidValue = InvalidValue::new(
            "must be a plain email address like name@domain.example of at most 254 characters",
        );

        let address = text::parse(raw, LineMode::Single, 1..=MAX_EMAIL_LENGTH)?;
        let (local, domain) = address.rsplit_once('@').ok_or(ALLOWED)?;
        let domain = Domain::parse(domain).ok_or(ALLOWED)?;
        // Only the ASCII form has a syntax that is independent of Unicode's version.
        let options =
            Options::default().with_required_tld().without_domain_literal().without_display_text();
        let ascii = format!("{local}@{}", domain.ascii);
        let parsed = EmailAddress::parse_with_options(&ascii, options).map_err(|_| ALLOWED)?;
        // No top-level domain consists of digits only, so this is an IPv4 address.
        let tld = parsed.domain().rsplit('.').next().unwrap_or_default();
        let is_ip = tld.bytes().all(|byte| byte.is_ascii_digit());
        if parsed.local_part().starts_with('"') || is_ip {
            return Err(ALLOWED);
        }
        let address = format!("{local}@{}", domain.unicode);
        // The Unicode form may be longer.
        text::check_length(&address, 1..=MAX_EMAIL_LENGTH)?;
        Ok(Self(address))
    }

    /// Returns the address as it is stored.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the key for comparison with other addresses.
    #[must_use]
    pub fn key(&self) -> EmailKey {
        EmailKey::new(&self.0)
    }
}

/// What identifies an address: two addresses are the same if their local parts differ in case
/// only and their domains are the same under IDNA.
#[derive(Clone, Debug)]
pub struct EmailKey {
    /// The address with its local part folded and its domain in the Unicode form.
    folded: String,
    /// All forms that a stored row of the address may have, the most likely row first.
    stored_forms: Vec<String>,
}

impl EmailKey {
    /// Derives the key of any text with an `@`. A text that is no valid address has a key that
    /// at most rows of earlier releases have.
    #[must_use]
    pub fn new(address: &str) -> Self {
        let typed = fold_case(address);
        let parts = address.rsplit_once('@').map(|(local, domain)| (local, Domain::parse(domain)));
        let Some((local, Some(domain))) = parts else {
            return Self { folded: typed.clone(), stored_forms: vec![typed] };
        };
        let local = fold_case(local);
        let folded = format!("{local}@{}", domain.unicode);
        let mut stored_forms = vec![typed];
        for form in [folded.clone(), fold_case(&folded), format!("{local}@{}", domain.ascii)] {
            if !stored_forms.contains(&form) {
                stored_forms.push(form);
            }
        }
        Self { folded, stored_forms }
    }

    /// Returns the form of new rows, which is unique among them.
    #[must_use]
    pub fn folded(&self) -> &str {
        &self.folded
    }

    /// Returns all forms that a row of the address may have, the most likely row first. A row
    /// with one of them may still have another address.
    #[must_use]
    pub fn stored_forms(&self) -> &[String] {
        &self.stored_forms
    }

    /// Returns `true` if only one form exists, which is so for all domains that are not
    /// international.
    #[must_use]
    pub fn is_unambiguous(&self) -> bool {
        self.stored_forms.len() == 1
    }

    /// Returns `true` if both are keys of the same address.
    #[must_use]
    pub fn is_same_address(&self, other: &Self) -> bool {
        self.folded == other.folded
    }
}

/// The two forms of a domain under IDNA (UTS 46, section 4).
struct Domain {
    unicode: String,
    ascii: String,
}

impl Domain {
    /// Returns `None` if the domain is invalid, or longer than DNS allows.
    fn parse(raw: &str) -> Option<Self> {
        let uts46 = Uts46::new();
        // As browsers: a name like `r3---sn.example` exists.
        let hyphens = Hyphens::Allow;
        // The syntax of an email address is stricter, and is checked in the ASCII form.
        let denied = AsciiDenyList::EMPTY;
        let ascii = uts46.to_ascii(raw.as_bytes(), denied, hyphens, DnsLength::Verify).ok()?;
        let (unicode, valid) = uts46.to_unicode(raw.as_bytes(), denied, hyphens);
        valid.ok()?;
        Some(Self { unicode: unicode.into_owned(), ascii: ascii.into_owned() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_validated() {
        for (raw, stored) in [
            ("ana@example.com", "ana@example.com"),
            (" Ana.Luz+todo@EXAMPLE.Com ", "Ana.Luz+todo@example.com"),
            ("josé@exämple.de", "josé@exämple.de"),
            ("jo@XN--MNCHEN-3YA.de", "jo@münchen.de"),
            ("jo@MÜNCHEN。de", "jo@münchen.de"),
            ("jo@STRAẞE.de", "jo@straße.de"),
            ("jo@xn--p1b6ci4b4b3a.xn--11b5bs3a9aj6g", "jo@उदाहरण.परीक्षा"),
            // The capital letter maps to a letter with a combining dot.
            ("ana@İ.com", "ana@i\u{307}.com"),
            ("ana@r3---sn.example", "ana@r3---sn.example"),
        ] {
            assert_eq!(Email::parse(raw), Ok(Email(stored.to_owned())), "{raw}");
        }
        for invalid in [
            "",
            "ana",
            "@example.com",
            "ana@",
            "ana@localhost",
            "ana@[127.0.0.1]",
            "ana@127.0.0.1",
            "ana@1.2.3.400",
            "ana@１.２.３.４",
            "Ana <ana@example.com>",
            "\"ana luz\"@example.com",
            "ana luz@example.com",
            "ana@exam ple.com",
            "ana@example..com",
            "ana@example.com.",
            "ana@example.com\n",
            "ana\0@example.com",
            "a@b@example.com",
            &format!("ana@{}.com", "a.".repeat(130)),
            // Punycode of nothing, and of a text that IDNA maps to another one.
            "ana@xn--.com",
            "ana@xn--a.com",
            "ana@xn--strasse-.de",
            // A label of 64 bytes in ASCII.
            &format!("ana@{}.com", "a".repeat(64)),
        ] {
            assert!(Email::parse(invalid).is_err(), "{invalid:?}");
        }
    }

    #[test]
    fn spellings_of_an_address_are_the_same_and_others_are_not() {
        let same = |one: &str, other| EmailKey::new(one).is_same_address(&EmailKey::new(other));
        for (one, other) in [
            ("JOSÉ@example.com", "josé@EXAMPLE.com"),
            ("jo@münchen.de", "JO@xn--mnchen-3ya.de"),
            ("jo@MÜNCHEN.de", "jo@mu\u{308}nchen.de"),
            ("jo@straße.de", "jo@xn--strae-oqa.de"),
            ("jo@straße.de", "jo@STRAẞE.de"),
            ("straße@example.com", "STRASSE@example.com"),
            // No domain at all: as typed.
            ("jo@a..b", "JO@A..B"),
        ] {
            assert!(same(one, other), "{one} {other}");
        }
        for (one, other) in [
            ("jo@straße.de", "jo@strasse.de"),
            ("jo@πας.gr", "jo@πασ.gr"),
            ("jo@münchen.de", "jo@munchen.de"),
            ("jo@example.com", "ja@example.com"),
        ] {
            assert!(!same(one, other), "{one} {other}");
        }
    }

    #[test]
    fn rows_of_earlier_releases_are_among_the_stored_forms() {
        for (typed, earlier) in [
            ("jo@xn--mnchen-3ya.de", "jo@xn--mnchen-3ya.de"),
            ("jo@münchen.de", "jo@xn--mnchen-3ya.de"),
            ("jo@xn--strae-oqa.de", "jo@strasse.de"),
            ("jo@straße.de", "jo@strasse.de"),
            // Domains that are not valid under IDNA.
            ("Jo@xn--a.com", "jo@xn--a.com"),
        ] {
            let key = EmailKey::new(typed);
            assert!(key.stored_forms().iter().any(|form| form == earlier), "{typed}: {key:?}");
        }
        for plain in ["jo@example.com", "JOSÉ@Example.com"] {
            assert!(EmailKey::new(plain).is_unambiguous(), "{plain}");
        }
    }

    proptest! {
        #[test]
        fn a_parsed_address_parses_to_itself(
            raw in prop_oneof![
                any::<String>(),
                "[ ]?[a-zA-Z.+é\"]{1,8}@[a-zA-ZÉİΣß0-9.-]{1,12}\\.[a-zA-Z0-9İΣ]{1,4}[ ]?",
                "[a-z]{1,3}@xn--[a-z0-9-]{1,12}\\.[a-z]{2,3}",
                "\\PC{1,10}@\\PC{1,10}\\.\\PC{1,5}",
            ]
        ) {
            if let Ok(email) = Email::parse(&raw) {
                prop_assert!(email.as_str().contains('@'));
                prop_assert!(email.as_str().chars().count() <= MAX_EMAIL_LENGTH);
                prop_assert!(email.key().is_same_address(&EmailKey::new(raw.trim())));
                prop_assert!(
                    email.key().stored_forms().iter().any(|form| form == email.key().folded())
                );
                prop_assert_eq!(Email::parse(email.as_str()), Ok(email));
            }
        }
    }
}
