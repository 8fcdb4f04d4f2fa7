//! Tests of access tokens: keys, algorithms, expiry and the cache.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::EncodingKey;
use proptest::prelude::*;
use time::macros::datetime;

use super::*;
use crate::crypto::{
    keys::SecretKey,
    month_key::{Month, MonthKey},
};

const ALGORITHMS: [Algorithm; 2] = [Algorithm::EdDsa, Algorithm::Hs256];
const NOW: OffsetDateTime = datetime!(2026-12-15 12:00 UTC);

fn key(byte: char) -> SecretKey {
    SecretKey::new(byte.to_string().repeat(32).into()).expect("long enough")
}

fn caller() -> SessionCaller {
    SessionCaller { user_id: UserId::any(), session_id: SessionId::any() }
}

fn tokens_of(keyring: Keyring, algorithm: Algorithm) -> AccessTokens {
    let (issuer, audience) = ("fast-zero".to_owned(), "fast-zero".to_owned());
    let lifetime = Duration::minutes(30);
    AccessTokens::new(keyring, TokenSettings { algorithm, issuer, audience, lifetime })
}

fn tokens(algorithm: Algorithm) -> AccessTokens {
    tokens_of(Keyring::new(key('k'), None), algorithm)
}

fn issued(tokens: &AccessTokens, now: OffsetDateTime) -> String {
    tokens.issue(caller(), now).expect("a token").0
}

fn kid(token: &str) -> Option<String> {
    jsonwebtoken::decode_header(token).expect("a token").kid
}

fn algorithm() -> impl Strategy<Value = Algorithm> {
    prop::sample::select(&ALGORITHMS[..])
}

#[test]
fn an_access_token_is_valid_until_it_expires() {
    for algorithm in ALGORITHMS {
        let (tokens, caller) = (tokens(algorithm), caller());
        let (token, expires_at) = tokens.issue(caller, NOW).expect("a token");
        let valid = VerifiedToken { caller, expires_at };
        // The first call verifies the signature, and the others use the cache.
        for now in [NOW, NOW, expires_at, expires_at + Duration::milliseconds(4_999)] {
            assert_eq!(tokens.verify(&token, now).expect("valid"), valid);
        }
        let after_leeway = expires_at + Duration::seconds(5);
        for _ in 0..2 {
            let error = tokens.verify(&token, after_leeway).expect_err("expired");
            assert!(
                matches!(error, Error::TokenExpired { server_time } if server_time == after_leeway)
            );
        }
    }
}

#[test]
fn the_previous_secret_verifies_but_does_not_sign() {
    for algorithm in ALGORITHMS {
        let old = tokens(algorithm);
        let both = tokens_of(Keyring::new(key('n'), Some(key('k'))), algorithm);
        let new = tokens_of(Keyring::new(key('n'), None), algorithm);
        let token = issued(&old, NOW);
        assert!(both.verify(&token, NOW).is_ok());
        assert!(new.verify(&token, NOW).is_err());
        let token = issued(&both, NOW);
        assert!(new.verify(&token, NOW).is_ok());
        assert!(old.verify(&token, NOW).is_err());
    }
}

/// The rollout of a new secret: first as the previous one everywhere, then swapped.
#[test]
fn replicas_verify_the_tokens_of_a_new_secret_before_they_sign_with_it() {
    for algorithm in ALGORITHMS {
        let prepared = tokens_of(Keyring::new(key('o'), Some(key('n'))), algorithm);
        let swapped = tokens_of(Keyring::new(key('n'), Some(key('o'))), algorithm);
        for (one, other) in [(&prepared, &swapped), (&swapped, &prepared)] {
            assert!(one.verify(&issued(other, NOW), NOW).is_ok());
        }
        let kids = |tokens: &AccessTokens| tokens.published_keys(NOW);
        let (mut before, after) = (kids(&prepared), kids(&swapped));
        assert_eq!(before.len(), 6);
        before.rotate_left(3);
        assert_eq!(before, after, "the current secret comes first");
    }
}

#[test]
fn tokens_of_both_algorithms_verify_whichever_signs() {
    let (eddsa, hs256) = (tokens(Algorithm::EdDsa), tokens(Algorithm::Hs256));
    for (one, other) in [(&eddsa, &hs256), (&hs256, &eddsa)] {
        assert!(one.verify(&issued(other, NOW), NOW).is_ok());
        assert_ne!(kid(&issued(one, NOW)), kid(&issued(other, NOW)));
    }
    assert_eq!(eddsa.published_keys(NOW), hs256.published_keys(NOW));
}

#[test]
fn a_token_verifies_from_the_month_before_its_key_signs_to_the_month_after() {
    let long_lived = |now| {
        let mut tokens = tokens(Algorithm::EdDsa);
        tokens.settings.lifetime = Duration::days(3_650);
        issued(&tokens, now)
    };
    let token = long_lived(NOW);
    // Also with a cache that holds the token.
    let warm = tokens(Algorithm::EdDsa);
    for (now, is_valid) in [
        (datetime!(2026-10-31 23:59:59 UTC), false),
        (datetime!(2026-11-01 00:00 UTC), true),
        (datetime!(2026-12-31 23:59:59 UTC), true),
        (datetime!(2027-01-31 23:59:59 UTC), true),
        (datetime!(2027-02-01 00:00 UTC), false),
        (datetime!(2027-03-15 00:00 UTC), false),
        (NOW, true),
    ] {
        for tokens in [&tokens(Algorithm::EdDsa), &warm] {
            match tokens.verify(&token, now) {
                Ok(_) => assert!(is_valid, "{now}"),
                Err(error) => {
                    assert!(!is_valid && matches!(error, Error::TokenInvalid), "{now}: {error}");
                }
            }
        }
    }
    let last_quarter = long_lived(datetime!(2026-09-30 23:59:59 UTC));
    assert!(matches!(warm.verify(&last_quarter, NOW), Err(Error::TokenInvalid)));
}

#[test]
fn replicas_with_different_clocks_agree_at_the_end_of_a_month() {
    let end = datetime!(2027-01-01 00:00 UTC);
    let (early, late) = (end - Duration::seconds(30), end + Duration::seconds(30));
    let (one, other) = (tokens(Algorithm::EdDsa), tokens(Algorithm::EdDsa));
    let (before, after) = (issued(&one, early), issued(&other, late));
    assert_ne!(kid(&before), kid(&after));
    assert!(other.verify(&before, late).is_ok());
    assert!(one.verify(&after, early).is_ok());
    // A verifier that fetched the keys in the last moment of the month needs no others.
    let fetched = one.published_keys(end - Duration::milliseconds(1));
    assert!(fetched.iter().any(|key| Some(&key.kid) == kid(&after).as_ref()));
}

#[test]
fn a_token_is_signed_with_the_key_of_the_month() {
    let tokens = tokens(Algorithm::EdDsa);
    for now in [
        datetime!(2026-11-30 23:59:59 UTC),
        datetime!(2026-12-01 00:00 UTC),
        // The clock of the database was set back.
        datetime!(2026-11-30 23:59:59 UTC),
    ] {
        let expected = MonthKey::derive(&key('k'), Month::at(now)).public;
        assert_eq!(kid(&issued(&tokens, now)), Some(expected.kid.clone()));
        assert_eq!(tokens.published_keys(now)[1], expected);
    }
}

/// Signs valid claims with any header and key.
fn forged(algorithm: jsonwebtoken::Algorithm, kid: Option<&str>, key: &EncodingKey) -> String {
    let mut header = Header::new(algorithm);
    header.typ = Some(ACCESS_TOKEN_TYPE.to_owned());
    header.kid = kid.map(str::to_owned);
    jsonwebtoken::encode(&header, &claims(NOW.unix_timestamp() + 60), key).expect("a token")
}

fn claims(exp: i64) -> Claims {
    let id = || Uuid::now_v7().to_string();
    let (iss, aud) = ("fast-zero".to_owned(), "fast-zero".to_owned());
    Claims { iss, aud, sub: id(), sid: id(), jti: String::new(), iat: i64::MIN, exp }
}

#[test]
fn the_key_id_alone_determines_key_and_algorithm() {
    use jsonwebtoken::Algorithm::{EdDSA, HS256};

    let (secret, other) = (key('k'), key('o'));
    let month = Month::at(NOW);
    let (this, foreign) = (MonthKey::derive(&secret, month), MonthKey::derive(&other, month));
    let next = MonthKey::derive(&secret, month.verifying()[2]);
    let hmac = |bytes: &[u8]| EncodingKey::from_secret(bytes);
    let public = URL_SAFE_NO_PAD.decode(&this.public.x).expect("base64url");
    let (eddsa_kid, hs256_kid) = (&*this.public.kid, &*secret.key_id());
    let tokens = tokens(Algorithm::EdDsa);
    for valid in [
        forged(EdDSA, Some(eddsa_kid), &this.signing),
        forged(EdDSA, Some(&next.public.kid), &next.signing),
        forged(HS256, Some(hs256_kid), &hmac(secret.as_bytes())),
    ] {
        assert!(tokens.verify(&valid, NOW).is_ok());
    }
    let forgeries = [
        ("the public key as secret", forged(HS256, Some(eddsa_kid), &hmac(&public))),
        ("its text as secret", forged(HS256, Some(eddsa_kid), &hmac(this.public.x.as_bytes()))),
        ("HS256 with the kid of EdDSA", forged(HS256, Some(eddsa_kid), &hmac(secret.as_bytes()))),
        ("EdDSA with the kid of HS256", forged(EdDSA, Some(hs256_kid), &this.signing)),
        ("the public key and the kid of HS256", forged(HS256, Some(hs256_kid), &hmac(&public))),
        ("the kid of another month", forged(EdDSA, Some(&next.public.kid), &this.signing)),
        ("the key of another secret", forged(EdDSA, Some(eddsa_kid), &foreign.signing)),
        ("another secret", forged(EdDSA, Some(&foreign.public.kid), &foreign.signing)),
        ("another secret, HS256", forged(HS256, Some(&other.key_id()), &hmac(other.as_bytes()))),
        ("no kid, EdDSA", forged(EdDSA, None, &this.signing)),
        ("no kid, HS256", forged(HS256, None, &hmac(secret.as_bytes()))),
        ("an empty kid", forged(HS256, Some(""), &hmac(secret.as_bytes()))),
        ("a kid with a space", forged(EdDSA, Some(&format!("{eddsa_kid} ")), &this.signing)),
    ];
    for (fault, forgery) in forgeries {
        let rejected = tokens.verify(&forgery, NOW);
        assert!(matches!(rejected, Err(Error::TokenInvalid)), "{fault}");
    }
}

#[test]
fn a_token_without_an_algorithm_is_invalid() {
    let tokens = tokens(Algorithm::EdDsa);
    let valid = issued(&tokens, NOW);
    let parts: Vec<_> = valid.split('.').collect();
    let kid = kid(&valid).expect("a kid");
    for alg in ["none", "None", "NONE", "HS256", "HS512", "ES256", ""] {
        let header = format!(r#"{{"typ":"at+jwt","alg":"{alg}","kid":"{kid}"}}"#);
        let header = URL_SAFE_NO_PAD.encode(header);
        for signature in ["", parts[2]] {
            let token = format!("{header}.{}.{signature}", parts[1]);
            assert!(matches!(tokens.verify(&token, NOW), Err(Error::TokenInvalid)), "{alg}");
        }
    }
}

#[test]
fn invalid_tokens_are_not_remembered() {
    let tokens = tokens(Algorithm::EdDsa);
    let valid = issued(&tokens, NOW);
    tokens.verify(&valid, NOW).expect("valid");
    for number in 0..100 {
        tokens.verify(&format!("{valid}{number}"), NOW).expect_err("invalid");
        let later = NOW + Duration::hours(1);
        tokens.verify(&issued(&tokens, NOW), later).expect_err("expired");
    }
    assert_eq!(tokens.verified.len(), 1);
}

proptest! {
    #[test]
    fn issued_access_tokens_are_valid(
        algorithm in algorithm(), user: u128, session: u128, age in 0_i64..30 * 60
    ) {
        let caller = SessionCaller {
            user_id: UserId::from_uuid(Uuid::from_u128(user)),
            session_id: SessionId::from_uuid(Uuid::from_u128(session)),
        };
        let tokens = tokens(algorithm);
        let (token, expires_at) = tokens.issue(caller, NOW).expect("a token");
        for _ in 0..2 {
            let verified = tokens.verify(&token, NOW + Duration::seconds(age)).expect("valid");
            prop_assert_eq!(verified, VerifiedToken { caller, expires_at });
        }
    }

    #[test]
    fn a_modified_access_token_is_invalid(
        algorithm in algorithm(), at: prop::sample::Index, byte in "[-A-Za-z0-9_.=é]"
    ) {
        let tokens = tokens(algorithm);
        let token = issued(&tokens, NOW);
        // The cache does not know the modified one.
        tokens.verify(&token, NOW).expect("valid");
        let at = at.index(token.len());
        let modified = format!("{}{byte}{}", &token[..at], &token[at + 1..]);
        prop_assert_eq!(tokens.verify(&modified, NOW).is_ok(), modified == token);
        let extended = format!("{}{byte}{}", &token[..at], &token[at..]);
        prop_assert!(tokens.verify(&extended, NOW).is_err());
    }

    #[test]
    fn signed_claims_are_accepted_or_rejected(
        algorithm in algorithm(), exp in prop_oneof![any::<i64>(), -10_i64..10],
        sub: String, sid: String, valid: bool
    ) {
        let tokens = tokens(algorithm);
        let now = NOW.unix_timestamp();
        let exp = if (-10..10).contains(&exp) { now + exp } else { exp };
        let claims = if valid { claims(exp) } else { Claims { sub, sid, ..claims(exp) } };
        let token = tokens.sign(&claims, NOW).expect("a token");
        let is_valid_time = OffsetDateTime::from_unix_timestamp(exp).is_ok();
        match tokens.verify(&token, NOW) {
            Ok(verified) => {
                prop_assert!(valid && exp > now - TOKEN_LEEWAY.whole_seconds());
                prop_assert_eq!(verified.expires_at.unix_timestamp(), exp);
            }
            Err(Error::TokenExpired { .. }) => {
                prop_assert!(valid && exp <= now - TOKEN_LEEWAY.whole_seconds());
            }
            Err(Error::TokenInvalid) => prop_assert!(!(valid && is_valid_time)),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn garbage_is_not_an_access_token(text in "\\PC{0,120}") {
        prop_assert!(tokens(Algorithm::EdDsa).verify(&text, NOW).is_err());
    }
}
