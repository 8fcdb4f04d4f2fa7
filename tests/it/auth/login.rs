//! Logins: accepted identifiers, errors, and the created session.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use fast_zero::proto::auth::v1::LoginResponse;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;
use tokio::task::JoinHandle;
use tonic::transport::Endpoint;
use uuid::Uuid;

use crate::support::{
    App, Client, PASSWORD, RpcResult,
    app::{config_with, unique_name},
    assert::{assert_invalid, assert_unauthenticated},
    parallel::join_all,
    statements::statement_count,
    time::{assert_recent, to_system_time, uuid_timestamp},
    tokens::TokenKey,
    wait::wait_until,
};

#[tokio::test]
async fn a_login_accepts_the_username_or_email_in_any_case_and_trimmed() {
    let app = App::start().await;
    let user = app.anonymous().sign_up("Ana", "José@example.com", PASSWORD).await;
    for login in [
        "Ana",
        "ana",
        "ANA",
        "  aNa\u{3000}",
        "José@example.com",
        "JOSÉ@EXAMPLE.COM",
        "josé@example.com",
        "jose\u{301}@example.com",
        " José@Example.com ",
    ] {
        let client = app.logged_in(login).await;
        assert_eq!(client.get_user("me").await, user, "{login:?}");
    }
}

#[tokio::test]
async fn empty_fields_are_reported() {
    let app = App::start().await;
    app.create_user("ana").await;
    for (login, password, fields) in [
        ("", "", &["login", "password"][..]),
        ("", PASSWORD, &["login"]),
        ("ana", "", &["password"]),
    ] {
        assert_invalid(app.anonymous().try_log_in(login, password).await, fields);
    }
}

/// Logins that fail for all kinds of reasons.
fn wrong_logins() -> Vec<(String, String)> {
    let (right, long) = ("ana".to_owned(), "a".repeat(1_000));
    let wrong_password = |password: &str| (right.clone(), password.to_owned());
    let wrong_login = |login: &str| (login.to_owned(), PASSWORD.to_owned());
    vec![
        wrong_password("another password"),
        wrong_password("x"),
        wrong_password(&long),
        wrong_password(&PASSWORD.to_uppercase()),
        wrong_password(&format!("{PASSWORD} ")),
        wrong_password(&format!(" {PASSWORD}")),
        wrong_password(&format!("{PASSWORD}\0")),
        wrong_password(&format!("{PASSWORD}\n")),
        wrong_password(&PASSWORD[..8]),
        wrong_password("🦀🦀🦀🦀🦀🦀🦀🦀"),
        wrong_login("stranger"),
        wrong_login("stranger@example.com"),
        wrong_login("a"),
        wrong_login("@"),
        wrong_login(&long),
        wrong_login(&format!("{long}@example.com")),
        wrong_login("ana\0"),
        wrong_login("\0ana"),
        wrong_login("ana\u{7f}"),
        wrong_login("a\nna"),
        wrong_login("ana%"),
        wrong_login("an_"),
        wrong_login("ana' or '1'='1"),
        wrong_login("🦀"),
        (long.clone(), long),
    ]
}

#[tokio::test]
async fn all_failed_logins_return_the_same_error() {
    let app = App::start().await;
    app.create_user("ana").await;
    let caller = app.anonymous().with_metadata("x-request-id", "always-the-same");
    let mut rejections = BTreeSet::new();
    for (login, password) in wrong_logins() {
        let rejected = caller.try_log_in(&login, &password).await;
        let rejected = assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
        assert_eq!(rejected.message(), "Incorrect email or password", "{login:?} {password:?}");
        let metadata = rejected.metadata().clone().into_headers();
        let metadata = metadata.iter().filter(|(name, _)| *name != "date");
        let mut metadata: Vec<_> = metadata.map(|entry| format!("{entry:?}")).collect();
        metadata.sort();
        rejections.insert((rejected.details().to_vec(), metadata));
    }
    assert_eq!(rejections.len(), 1, "details and metadata, to the byte");
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from sessions").await, 0);
}

/// A login in flight, with its request id.
struct PendingLogin(String, JoinHandle<RpcResult<LoginResponse>>);

impl PendingLogin {
    fn start(app: &App, login: &str, password: &str) -> Self {
        let request_id = unique_name("login-");
        let caller = app.anonymous().with_metadata("x-request-id", &request_id);
        let (login, password) = (login.to_owned(), password.to_owned());
        let response = async move { caller.try_log_in(&login, &password).await };
        Self(request_id, tokio::spawn(response))
    }

    async fn wait_until_looked_up(&self) {
        wait_until("the user is looked up", async || statement_count(&self.0) == 1).await;
    }
}

#[tokio::test]
async fn all_failed_logins_do_the_same_work() {
    let app = App::start_with(config_with(|config| {
        config.limits.hashing_threads = 1;
    }))
    .await;
    let (ana, _) = (app.signed_up("ana").await, app.create_user("slow").await);
    // Checking this password occupies the only hashing thread for half a second.
    app.execute(
        "update users set password_hash =
             regexp_replace(password_hash, 'm=\\d+,t=\\d+', 'm=65536,t=12')
         where username = 'slow'",
    )
    .await;
    let slow = PendingLogin::start(&app, "slow", "another password");
    slow.wait_until_looked_up().await;

    let long = "a".repeat(1_000);
    let attempts = [
        ("ana", "another password"),
        ("ana", &*long),
        ("ana", "pass\0word"),
        ("stranger", PASSWORD),
        ("stranger@example.com", PASSWORD),
        (&*long, PASSWORD),
        ("ana\0", PASSWORD),
    ]
    .map(|(login, password)| PendingLogin::start(&app, login, password));
    for attempt in &attempts {
        attempt.wait_until_looked_up().await;
    }
    for _ in 0..5 {
        ana.get_user("me").await;
    }
    assert!(!slow.1.is_finished(), "the thread is still occupied");
    let finished = attempts.iter().map(|attempt| attempt.1.is_finished()).collect::<Vec<_>>();
    assert!(!finished.contains(&true), "some did not wait for the thread: {finished:?}");
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claims {
    iss: String,
    aud: String,
    sub: String,
    sid: String,
    jti: String,
    iat: u64,
    exp: u64,
}

#[tokio::test]
async fn a_login_returns_the_tokens_of_a_new_session() {
    const MINUTES: u32 = 7;
    const DAYS: u32 = 3;
    let settings = config_with(|config| {
        config.tokens.access_token_expire_minutes = MINUTES;
        config.tokens.refresh_token_expire_days = DAYS;
        config.tokens.token_issuer = "the issuer".into();
        config.tokens.token_audience = "the audience".into();
    });
    let app = App::start_with(settings).await;
    let started = SystemTime::now();
    let ana = app.signed_up("ana").await;
    let tokens = ana.tokens();
    assert_eq!(tokens.token_type, "Bearer");
    assert_recent(started, Duration::from_mins(MINUTES.into()), tokens.access_token_expire_time);
    let days = Duration::from_hours(u64::from(DAYS) * 24);
    assert_recent(started, days, tokens.refresh_token_expire_time);
    let session = ana.list_sessions().await.remove(0);
    assert_eq!(session.id, tokens.session_id);

    let header = jsonwebtoken::decode_header(&tokens.access_token).expect("a JWT");
    assert_eq!((header.alg, header.typ.as_deref()), (Algorithm::EdDSA, Some("at+jwt")));
    let key = TokenKey::of_this_month();
    assert_eq!(header.kid, Some(key.kid()));
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.set_issuer(&["the issuer"]);
    validation.set_audience(&["the audience"]);
    let key = DecodingKey::from_ed_components(&key.public_key()).expect("a public key");
    let token =
        jsonwebtoken::decode(&tokens.access_token, &key, &validation).expect("a valid token");
    let claims: Claims = token.claims;
    assert_eq!((&*claims.iss, &*claims.aud), ("the issuer", "the audience"));
    assert_eq!((&claims.sub, &claims.sid), (&ana.user_id(), &tokens.session_id));
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    assert_eq!(at(claims.exp), to_system_time(tokens.access_token_expire_time));
    assert_eq!(claims.exp - claims.iat, u64::from(MINUTES) * 60);

    let other = app.logged_in("ana").await.tokens().clone();
    let other = jsonwebtoken::decode::<Claims>(&other.access_token, &key, &validation);
    let other = other.expect("a valid token").claims;
    assert_ne!(other.jti, claims.jti);
    assert_ne!(other.sid, claims.sid);
}

#[tokio::test]
async fn a_session_records_the_client_of_its_login() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let user_agent = "a browser, ".repeat(100);
    let endpoint = Endpoint::from_shared(format!("http://{}", app.address)).expect("an address");
    let endpoint = endpoint.user_agent(&*user_agent).expect("a header");
    let browser = Client::new(endpoint.connect().await.expect("connected"));
    let started = SystemTime::now();
    let browser = browser.logged_in("ana", PASSWORD).await.expect("logged in");

    let sessions = ana.list_sessions().await;
    let [session, _] = &sessions[..] else { panic!("{sessions:?}") };
    assert_eq!(session.id, browser.tokens().session_id);
    assert_eq!(Uuid::parse_str(&session.id).expect("a UUID").to_string(), session.id);
    assert_eq!(session.user_agent, user_agent[..256]);
    assert_eq!(session.peer, "127.0.0.1");
    assert_eq!(session.create_time, Some(uuid_timestamp(&session.id)));
    assert_recent(started, Duration::ZERO, session.create_time);
    assert_recent(started, Duration::ZERO, session.last_used_time);
    assert_eq!(session.expire_time, browser.tokens().refresh_token_expire_time);
}

#[tokio::test]
async fn a_login_beyond_a_hundred_active_sessions_revokes_the_oldest() {
    let app = App::start().await;
    let (first, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let second = app.logged_in("ana").await;
    for _ in 0..98 {
        app.logged_in("ana").await;
    }
    assert_eq!(first.list_sessions().await.len(), 100);
    assert!(first.is_session_active().await && second.is_session_active().await);

    let last = app.logged_in("ana").await;
    assert!(!first.is_session_active().await);
    let rejected = first.try_refresh(&first.tokens().refresh_token).await;
    assert_unauthenticated(rejected, "REFRESH_TOKEN_INVALID");
    let sessions = last.list_sessions().await;
    assert_eq!(sessions.len(), 100);
    assert_eq!(sessions[0].id, last.tokens().session_id);
    assert_eq!(sessions[99].id, second.tokens().session_id);
    assert!(second.is_session_active().await && bob.is_session_active().await);
}

#[tokio::test]
async fn concurrent_logins_leave_at_most_a_hundred_sessions() {
    let app = App::start().await;
    app.create_user("ana").await;
    for sessions in [30, 60, 90, 100] {
        let logins = (0..30).map(|_| {
            let caller = app.anonymous();
            async move { caller.logged_in("ana", PASSWORD).await }
        });
        for login in join_all(logins).await {
            login.expect("logged in");
        }
        assert_eq!(app.fetch_scalar::<i64>("select count(*) from sessions").await, sessions);
    }
}

#[tokio::test]
async fn a_login_deletes_the_users_expired_sessions_and_counts_only_active_ones() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for _ in 0..99 {
        app.logged_in("ana").await;
    }
    app.execute(
        "update sessions set expires_at = now() - interval '1 s'
         where id in (select id from sessions order by id desc limit 50)
            or user_id = (select id from users where username = 'bob')",
    )
    .await;
    let last = app.logged_in("ana").await;
    assert_eq!(last.list_sessions().await.len(), 51);
    assert!(ana.is_session_active().await && !bob.is_session_active().await);
    let expired = "select count(*) from sessions where expires_at < now()";
    assert_eq!(app.fetch_scalar::<i64>(expired).await, 1, "the session of bob");
}
