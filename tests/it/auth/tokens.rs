//! Access tokens: valid ones, and the errors of invalid ones.

use std::time::SystemTime;

use aws_lc_rs::hmac;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use fast_zero::proto::auth::v1::{IntrospectTokenResponse, LogoutScope, TokenKind};
use prost_types::Timestamp;
use tonic_types::StatusExt;
use uuid::Uuid;

use crate::support::{
    App, Client, PASSWORD,
    app::SECRET_KEY,
    assert::{assert_invalid, assert_unauthenticated},
    time::to_system_time,
    tokens::{Jwt, TokenKey, json_string, month, seconds_from_now, sign_parts},
};

/// Longer than the limit of metadata, 16 KiB.
const TOO_LONG: usize = 20 * 1024;

/// An invalid token, with the expected reason of the error.
struct InvalidToken {
    fault: &'static str,
    token: String,
    reason: &'static str,
}

/// Returns tokens with all kinds of faults, derived from the valid token of a caller.
async fn invalid_tokens(app: &App, ana: &Client) -> Vec<InvalidToken> {
    let mut tokens = inactive_sessions(app, ana).await;
    tokens.extend(wrong_signatures(ana));
    tokens.extend(wrong_eddsa_signatures(ana));
    for key in [TokenKey::of_this_month(), TokenKey::of_secret()] {
        tokens.extend(wrong_keys(ana, &key));
        tokens.extend(wrong_fields(ana, &key));
        tokens.extend(malformed_tokens(ana, &key));
    }
    tokens
}

fn invalid(fault: &'static str, token: String) -> InvalidToken {
    InvalidToken { fault, token, reason: "TOKEN_INVALID" }
}

async fn inactive_sessions(app: &App, ana: &Client) -> Vec<InvalidToken> {
    let (bob, cid) = (app.signed_up("bob").await, app.signed_up("cid").await);
    let (logged_out, revoked) = (app.logged_in("ana").await, app.logged_in("ana").await);
    logged_out.log_out(LogoutScope::ThisSession).await;
    ana.try_revoke_session(&revoked.tokens().session_id).await.expect("revoked");
    cid.try_delete_user("me", "").await.expect("deleted");
    let expired = app.signed_up("dan").await;
    app.execute(
        "update sessions set expires_at = now() - interval '1 s'
         where user_id = (select id from users where username = 'dan')",
    )
    .await;
    let (ana_id, unknown) = (ana.user_id(), Uuid::now_v7().to_string());
    let token = |client: &Client| client.tokens().access_token.clone();
    let made = |user_id: &str, session_id: &str| Jwt::for_session(user_id, session_id).signed();
    [
        ("the session was logged out", token(&logged_out)),
        ("the session was revoked", token(&revoked)),
        ("the user was deleted", token(&cid)),
        ("the session has expired", token(&expired)),
        ("another user's session", made(&ana_id, &bob.tokens().session_id)),
        ("another user in the session", made(&bob.user_id(), &ana.tokens().session_id)),
        ("an unknown session", made(&ana_id, &unknown)),
        ("an unknown user", made(&unknown, &ana.tokens().session_id)),
    ]
    .into_iter()
    .map(|(fault, token)| InvalidToken { fault, token, reason: "SESSION_REVOKED" })
    .collect()
}

/// Returns tokens of HS256, and tokens that name its key, with wrong signatures.
fn wrong_signatures(ana: &Client) -> Vec<InvalidToken> {
    let jwt = Jwt::for_client(ana).with_key(TokenKey::of_secret());
    let with = |algorithm: &str| jwt.clone().header("alg", json_string(algorithm));
    vec![
        invalid("no algorithm, no signature", with("none").unsigned()),
        invalid("no algorithm in odd case", with("nOnE").unsigned()),
        invalid("no algorithm, but signed", with("none").signed()),
        invalid("HS384 with the key", with("HS384").signed_with(hmac::HMAC_SHA384, SECRET_KEY)),
        invalid("HS512 with the key", with("HS512").signed_with(hmac::HMAC_SHA512, SECRET_KEY)),
        invalid("HS384 that calls itself HS256", jwt.signed_with(hmac::HMAC_SHA384, SECRET_KEY)),
        invalid("HS256 that calls itself HS512", with("HS512").signed()),
        invalid("RS256 with the key", with("RS256").signed()),
        invalid("EdDSA with the key", with("EdDSA").signed()),
        invalid("an unknown algorithm", with("X").signed()),
        invalid("an algorithm that is no text", jwt.clone().header("alg", "256").signed()),
        invalid("no algorithm field", jwt.clone().without_field("alg").signed()),
        invalid("another key", jwt.signed_with(hmac::HMAC_SHA256, "x".repeat(32))),
        invalid("an empty key", jwt.signed_with(hmac::HMAC_SHA256, "")),
        invalid("an expired token of another key", {
            jwt.claim("exp", seconds_from_now(-600)).signed_with(hmac::HMAC_SHA256, "x".repeat(32))
        }),
    ]
}

/// Returns tokens that name the key of this month, with wrong signatures.
fn wrong_eddsa_signatures(ana: &Client) -> Vec<InvalidToken> {
    let key = TokenKey::of_this_month();
    let jwt = Jwt::for_client(ana).with_key(key.clone());
    let with = |algorithm: &str| jwt.clone().header("alg", json_string(algorithm));
    let public = key.public_key();
    let public_bytes = URL_SAFE_NO_PAD.decode(&public).expect("base64url");
    let other_secret = TokenKey::EdDsa("x".repeat(32), month(0));
    let hmac_of = |secret: &[u8]| with("HS256").signed_with(hmac::HMAC_SHA256, secret);
    vec![
        invalid("no algorithm, no signature", with("none").unsigned()),
        invalid("no algorithm, but signed", with("none").signed()),
        invalid("the public key as secret of HS256", hmac_of(&public_bytes)),
        invalid("its text as secret of HS256", hmac_of(public.as_bytes())),
        invalid("the secret, and the kid of EdDSA", hmac_of(SECRET_KEY.as_bytes())),
        invalid("EdDSA that calls itself HS256", with("HS256").signed()),
        invalid("EdDSA that calls itself ES256", with("ES256").signed()),
        invalid("EdDSA that calls itself Ed25519", with("Ed25519").signed()),
        invalid("the kid of HS256", {
            jwt.clone().header("kid", json_string(&TokenKey::of_secret().kid())).signed()
        }),
        invalid("the kid of another month", {
            jwt.clone().with_key(TokenKey::of_month(1)).signed_with_key(&key)
        }),
        invalid("the key of another month", jwt.signed_with_key(&TokenKey::of_month(1))),
        invalid("the key of another secret", jwt.signed_with_key(&other_secret)),
        invalid("the secret and kid of another service", {
            jwt.clone().with_key(other_secret.clone()).signed()
        }),
        invalid("the key of two months ago", {
            jwt.clone().with_key(TokenKey::of_month(-2)).signed()
        }),
        invalid("the key of the last quarter", {
            jwt.clone().with_key(TokenKey::of_month(-3)).signed()
        }),
        invalid("the key of the month after the next", {
            jwt.clone().with_key(TokenKey::of_month(2)).signed()
        }),
        invalid("a key of its own in the header", {
            let jwk =
                format!(r#"{{"kty":"OKP","crv":"Ed25519","x":"{}"}}"#, other_secret.public_key());
            jwt.header("jwk", jwk).signed_with_key(&other_secret)
        }),
    ]
}

/// Returns tokens whose signature or `kid` is not that of the key.
fn wrong_keys(ana: &Client, key: &TokenKey) -> Vec<InvalidToken> {
    let jwt = Jwt::for_client(ana).with_key(key.clone());
    let kid = |json: &str| jwt.clone().header("kid", json).signed();
    let valid = jwt.signed();
    let (payload, signature) = valid.rsplit_once('.').expect("a signed token");
    let other_claims = jwt.clone().claim("exp", seconds_from_now(900)).signed();
    let (other_payload, _) = other_claims.rsplit_once('.').expect("a signed token");
    vec![
        invalid("no kid", jwt.clone().without_field("kid").signed()),
        invalid("an empty kid", kid("\"\"")),
        invalid("an unknown kid", kid("\"unknown\"")),
        invalid("a kid that is null", kid("null")),
        invalid("a kid that is no text", kid("1")),
        invalid("a kid that is a path", kid("\"../../dev/null\"")),
        invalid("a kid of 4 KiB", kid(&json_string(&"k".repeat(4_096)))),
        invalid("an empty signature", jwt.unsigned()),
        invalid("no signature", payload.to_owned()),
        invalid("half a signature", valid[..valid.len() - signature.len() / 2].to_owned()),
        invalid("more than a signature", format!("{valid}A")),
        invalid("another token's signature", format!("{other_payload}.{signature}")),
        invalid("a signature of zeros", {
            let zeros = vec![0; URL_SAFE_NO_PAD.decode(signature).expect("base64url").len()];
            format!("{payload}.{}", URL_SAFE_NO_PAD.encode(zeros))
        }),
    ]
}

fn wrong_fields(ana: &Client, key: &TokenKey) -> Vec<InvalidToken> {
    let jwt = Jwt::for_client(ana).with_key(key.clone());
    let header = |name, json: &str| jwt.clone().header(name, json).signed();
    let claim = |name, json: &str| jwt.clone().claim(name, json).signed();
    let mut tokens: Vec<_> = ["iss", "aud", "sub", "sid", "jti", "iat", "exp", "typ"]
        .map(|name| invalid("a field is missing", jwt.clone().without_field(name).signed()))
        .into();
    for name in ["iss", "aud", "sub", "sid", "exp"] {
        for json in ["null", "true", "[]", "{}", "\"\"", "\"x\"", "[\"x\"]"] {
            tokens.push(invalid("a claim of another type", claim(name, json)));
        }
    }
    for id in ["1", "me", "ana", "ana@example.com", &ana.user_id().to_uppercase()] {
        tokens.push(invalid("a user that is not an id", claim("sub", &json_string(id))));
        tokens.push(invalid("a session that is not an id", claim("sid", &json_string(id))));
    }
    tokens.extend([
        invalid("another type", header("typ", "\"JWT\"")),
        invalid("no type", header("typ", "\"\"")),
        invalid("a type that is no text", header("typ", "1")),
        invalid("another issuer", claim("iss", "\"fast-zero2\"")),
        invalid("another audience", claim("aud", "\"fast-zero2\"")),
        invalid("a number as user", claim("sub", "1")),
        invalid("not yet valid", claim("nbf", &seconds_from_now(60))),
        invalid("never valid", claim("nbf", &u64::MAX.to_string())),
        invalid("not yet valid, as a text", claim("nbf", &json_string(&seconds_from_now(60)))),
        invalid("a start that is no number", claim("nbf", "\"x\"")),
        invalid("an expiry beyond the range of times", claim("exp", &i64::MAX.to_string())),
        invalid("an expiry beyond the range of numbers", claim("exp", "1e400")),
        invalid("expired, and for another audience", {
            jwt.clone().claim("exp", seconds_from_now(-60)).claim("aud", "\"x\"").signed()
        }),
    ]);
    for past in [seconds_from_now(-60), seconds_from_now(-7), "1".into(), "0".into()] {
        tokens.push(InvalidToken {
            fault: "expired",
            token: claim("exp", &past),
            reason: "TOKEN_EXPIRED",
        });
    }
    tokens
}

fn malformed_tokens(ana: &Client, key: &TokenKey) -> Vec<InvalidToken> {
    let valid = &Jwt::for_client(ana).with_key(key.clone()).signed();
    let sign_parts = |header: &str, claims: &str| sign_parts(key, header, claims);
    let parts: Vec<_> = valid.split('.').collect();
    let [header, claims, signature] = parts[..] else { panic!("{valid}") };
    let decoded = |part| URL_SAFE_NO_PAD.decode(part).expect("base64");
    let text = |part| String::from_utf8(decoded(part)).expect("JSON");
    let deep = "[".repeat(4_000);
    vec![
        invalid("garbage", "garbage".to_owned()),
        invalid("8 KiB of garbage", "x".repeat(8 * 1024)),
        invalid("8 KiB of dots", ".".repeat(8 * 1024)),
        invalid("only dots", "..".to_owned()),
        invalid("two tokens", format!("{valid}.{valid}")),
        invalid("two tokens with a comma", format!("{valid}, Bearer {valid}")),
        invalid("an additional part", format!("{valid}.")),
        invalid("a missing part", format!("{claims}.{signature}")),
        invalid("parts in another order", format!("{claims}.{header}.{signature}")),
        invalid("padding", format!("{header}=.{claims}.{signature}")),
        invalid("a refresh token", ana.tokens().refresh_token.clone()),
        invalid("a session's id", ana.tokens().session_id.clone()),
        invalid("a header that is no JSON", sign_parts("x", &text(claims))),
        invalid("a header of brackets", sign_parts(&deep, &text(claims))),
        invalid("claims that are no JSON", sign_parts(&text(header), "x")),
        invalid("claims of brackets", sign_parts(&text(header), &deep)),
        invalid("claims that are a list", sign_parts(&text(header), "[]")),
        invalid("claims that are null", sign_parts(&text(header), "null")),
        invalid("no claims", sign_parts(&text(header), "")),
    ]
}

#[tokio::test]
async fn an_invalid_access_token_is_rejected_without_details() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for InvalidToken { fault, token, reason } in invalid_tokens(&app, &ana).await {
        let rejected = ana.clone().with_token(&token).try_get_user("me").await;
        assert!(rejected.is_err(), "{fault}: {token}");
        let rejected = assert_unauthenticated(rejected, reason);
        assert_eq!(rejected.message(), "Could not validate credentials", "{fault}");
    }
    assert!(ana.is_session_active().await);
}

#[tokio::test]
async fn introspection_returns_only_inactive_for_an_invalid_token() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for InvalidToken { fault, token, .. } in invalid_tokens(&app, &ana).await {
        let response = ana.introspect(&token).await;
        assert_eq!(response, IntrospectTokenResponse::default(), "{fault}: {token}");
    }
    let with_scheme = format!("Bearer {}", ana.tokens().access_token);
    for token in [&*with_scheme, " ", "\0", "🦀", &"x".repeat(100_000)] {
        assert_eq!(ana.introspect(token).await, IntrospectTokenResponse::default());
    }
}

#[tokio::test]
async fn introspection_returns_the_user_and_session_of_an_active_token() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for caller in [&ana, &bob] {
        assert_eq!(
            caller.introspect(&ana.tokens().access_token).await,
            IntrospectTokenResponse {
                active: true,
                user_id: ana.user_id(),
                session_id: ana.tokens().session_id.clone(),
                expire_time: ana.tokens().access_token_expire_time,
                kind: TokenKind::AccessToken.into(),
                ..IntrospectTokenResponse::default()
            }
        );
    }
    assert_invalid(ana.try_introspect("").await, &["access_token"]);
    let anonymous = app.anonymous().try_introspect(&ana.tokens().access_token).await;
    assert_unauthenticated(anonymous, "NOT_AUTHENTICATED");
    bob.try_delete_user("me", "").await.expect("deleted");
    assert!(!ana.introspect(&bob.tokens().access_token).await.active);
}

#[tokio::test]
async fn a_handmade_token_with_valid_claims_is_accepted() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let jwt = Jwt::for_client(&ana);
    for (fault, jwt) in [
        ("the same as a token of the service", jwt.clone()),
        ("the key of the previous month", jwt.clone().with_key(TokenKey::of_month(-1))),
        ("the key of the next month", jwt.clone().with_key(TokenKey::of_month(1))),
        ("HS256", jwt.clone().with_key(TokenKey::of_secret())),
        ("it expired within the leeway", jwt.clone().claim("exp", seconds_from_now(-2))),
        ("it becomes valid within the leeway", jwt.clone().claim("nbf", seconds_from_now(2))),
        ("it is already valid", jwt.clone().claim("nbf", seconds_from_now(-60))),
        ("it has another claim", jwt.claim("scope", "\"all\"")),
    ] {
        let token = jwt.signed();
        let user = ana.clone().with_token(&token).try_get_user("me").await;
        assert_eq!(user.expect(fault).into_inner().user, ana.user);
        assert!(ana.introspect(&token).await.active, "{fault}");
    }
}

/// RFC 7515, section 4.1.11.
#[tokio::test]
async fn a_token_with_a_critical_extension_is_rejected() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let token = Jwt::for_client(&ana).header("crit", "[\"x\"]").header("x", "1").signed();
    assert_unauthenticated(ana.with_token(&token).try_get_user("me").await, "TOKEN_INVALID");
}

#[tokio::test]
async fn an_expired_token_is_rejected_with_the_server_time() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let token = Jwt::for_client(&ana).claim("exp", seconds_from_now(-60)).signed();
    let started = SystemTime::now();
    let rejected = ana.with_token(&token).try_get_user("me").await;
    let rejected = assert_unauthenticated(rejected, "TOKEN_EXPIRED");
    let details = rejected.get_error_details();
    let metadata = &details.error_info().expect("ErrorInfo").metadata;
    let server_time: Timestamp = metadata["server_time"].parse().expect("RFC 3339");
    let server_time = to_system_time(Some(server_time));
    assert!((started..=SystemTime::now()).contains(&server_time));
}

#[tokio::test]
async fn a_call_needs_a_bearer_token() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let token = &ana.tokens().access_token;
    let rejected = app.anonymous().try_get_user("me").await;
    let rejected = assert_unauthenticated(rejected, "NOT_AUTHENTICATED");
    assert_eq!(rejected.message(), "Not authenticated");
    // Authentication precedes validation.
    assert_unauthenticated(app.anonymous().try_get_user("invalid").await, "NOT_AUTHENTICATED");
    for none in [
        "",
        " ",
        "Bearer",
        "Bearer ",
        "bearer    ",
        token,
        &format!("Basic {token}"),
        &format!("JWT {token}"),
        &format!("Bearer{token}"),
        &format!("Bearer:{token}"),
        &format!("Bearer,Bearer {token}"),
        &format!("\"Bearer\" {token}"),
    ] {
        let rejected =
            app.anonymous().with_metadata("authorization", none).try_get_user("me").await;
        let rejected = assert_unauthenticated(rejected, "NOT_AUTHENTICATED");
        assert_eq!(rejected.message(), "Not authenticated", "{none:?}");
    }
    for scheme in ["Bearer", "bearer", "BEARER", "bEaReR"] {
        let caller = app.anonymous().with_metadata("authorization", &format!("{scheme} {token}"));
        assert!(caller.is_session_active().await);
    }
}

#[tokio::test]
async fn more_than_one_authorization_header_is_rejected() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let valid = format!("Bearer {}", ana.tokens().access_token);
    for (first, second) in
        [(&*valid, &*valid), (&valid, "Basic x"), ("Basic x", &valid), ("", &valid)]
    {
        let caller = app
            .anonymous()
            .with_metadata("authorization", first)
            .with_metadata("authorization", second);
        let rejected = assert_unauthenticated(caller.try_get_user("me").await, "TOKEN_INVALID");
        assert_eq!(rejected.message(), "Could not validate credentials");
    }
}

#[tokio::test]
async fn headers_above_16_kib_are_rejected_and_the_connection_stays_open() {
    const GET_USER: &str = "/fastzero.user.v1.UserService/GetUser";
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    // The raw client never reconnects.
    let raw = app.raw_client().await.with_token_of(&ana);
    for (padding, is_ok) in
        [(TOO_LONG, false), (12 * 1024, true), (TOO_LONG, false), (TOO_LONG, false), (0, true)]
    {
        let caller = raw.clone().with_metadata("x-padding", "x".repeat(padding));
        // `id` is "me".
        let response = caller.call(GET_USER, b"\x0a\x02me").await;
        assert_eq!(response.is_ok(), is_ok, "{padding}: {response:?}");
    }
}

#[tokio::test]
async fn public_methods_ignore_access_tokens() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let garbage = ana.clone().with_token("garbage");
    garbage.sign_up("bob", "bob@example.com", PASSWORD).await;
    garbage.try_log_in("bob", PASSWORD).await.expect("logged in");
    garbage.refresh(&ana.tokens().refresh_token).await;
}
