//! Passwords: changing and storing them.

use std::time::{Duration, Instant};

use argon2::Params;
use tonic::Code;

use crate::support::{
    App, PASSWORD,
    app::config_with,
    assert::{assert_invalid, assert_status, assert_unauthenticated},
    users::own_user,
};

const NEW_PASSWORD: &str = "a new password";
const HASH: &str = "select password_hash from users";

/// Returns `true` if a login with this password succeeds. Otherwise asserts the error.
async fn can_log_in(app: &App, password: &str) -> bool {
    let response = app.anonymous().try_log_in("ana", password).await;
    let right = response.is_ok();
    if !right {
        assert_unauthenticated(response, "INCORRECT_CREDENTIALS");
    }
    right
}

#[tokio::test]
async fn a_password_change_replaces_the_password_and_revokes_all_other_sessions() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let other = app.logged_in("ana").await;
    assert!(other.is_session_active().await);
    ana.change_password(PASSWORD, NEW_PASSWORD).await;
    assert!(!can_log_in(&app, PASSWORD).await);
    assert!(can_log_in(&app, NEW_PASSWORD).await);
    assert!(!other.is_session_active().await);
    let rejected = other.try_refresh(&other.tokens().refresh_token).await;
    assert_unauthenticated(rejected, "REFRESH_TOKEN_INVALID");

    assert!(ana.is_session_active().await && bob.is_session_active().await);
    ana.refresh(&ana.tokens().refresh_token).await;
    ana.change_password(NEW_PASSWORD, PASSWORD).await;
    assert!(can_log_in(&app, PASSWORD).await);
}

#[tokio::test]
async fn all_invalid_fields_of_a_password_change_are_reported_and_nothing_changes() {
    let app = App::start().await;
    app.anonymous().sign_up("Ana.Luz.9", "José@example.com", PASSWORD).await;
    let ana = app.logged_in("ana.luz.9").await;
    let other = app.logged_in("ana.luz.9").await;
    for (current, new, fields) in [
        ("", "", &["current_password", "new_password"][..]),
        ("", NEW_PASSWORD, &["current_password"]),
        (PASSWORD, "", &["new_password"]),
        (PASSWORD, PASSWORD, &["new_password"]),
        (PASSWORD, "1234567", &["new_password"]),
        (PASSWORD, &"e\u{301}".repeat(7), &["new_password"]),
        (PASSWORD, &"x".repeat(129), &["new_password"]),
        (PASSWORD, "a new\0password", &["new_password"]),
        (PASSWORD, "a new password\n", &["new_password"]),
        (PASSWORD, "\u{85}a new password", &["new_password"]),
        (PASSWORD, "Ana.Luz.9", &["new_password"]),
        (PASSWORD, "aNA.lUZ.9", &["new_password"]),
        (PASSWORD, "José@example.com", &["new_password"]),
        (PASSWORD, "JOSE\u{301}@EXAMPLE.com", &["new_password"]),
        // Validation comes before the password is checked.
        ("wrong password", "ana.luz.9", &["new_password"]),
        ("wrong password", "short", &["new_password"]),
    ] {
        assert_invalid(ana.try_change_password(current, new).await, fields);
    }
    for wrong in ["wrong password", "x", &PASSWORD.to_uppercase(), &"x".repeat(1_000), "\0"] {
        let rejected = ana.try_change_password(wrong, NEW_PASSWORD).await;
        let rejected = assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
        assert_eq!(rejected.message(), "Incorrect email or password");
    }
    assert!(other.is_session_active().await);
    app.logged_in("ana.luz.9").await;
}

#[tokio::test]
async fn a_password_is_the_same_in_composed_and_decomposed_form() {
    const COMPOSED: &str = "p\u{e1}ssw\u{f6}rd\u{1e69}";
    const DECOMPOSED: &str = "pa\u{301}sswo\u{308}rds\u{323}\u{307}";
    let app = App::start().await;
    app.anonymous().sign_up("ana", "ana@example.com", DECOMPOSED).await;
    for password in [COMPOSED, DECOMPOSED] {
        assert!(can_log_in(&app, password).await);
    }
    let ana = app.anonymous().logged_in("ana", COMPOSED).await.expect("logged in");
    let same = ana.try_change_password(DECOMPOSED, COMPOSED).await;
    assert_invalid(same, &["new_password"]);
    ana.change_password(COMPOSED, NEW_PASSWORD).await;
    ana.change_password(NEW_PASSWORD, DECOMPOSED).await;
    assert!(can_log_in(&app, COMPOSED).await);
}

#[tokio::test]
async fn a_password_is_not_trimmed_and_is_case_sensitive() {
    const SPACED: &str = " \u{3000}Spaced password ";
    let app = App::start().await;
    app.anonymous().sign_up("ana", "ana@example.com", SPACED).await;
    for wrong in [SPACED.trim(), SPACED.trim_start(), SPACED.trim_end(), &SPACED.to_lowercase()] {
        assert!(!can_log_in(&app, wrong).await);
    }
    let ana = app.anonymous().logged_in("ana", SPACED).await.expect("logged in");
    ana.change_password(SPACED, SPACED.trim()).await;
    assert!(!can_log_in(&app, SPACED).await);
    assert!(can_log_in(&app, SPACED.trim()).await);
}

/// Asserts that the database contains no password and only one hash, and returns the hash.
async fn assert_stored_only_as_hash(app: &App, passwords: &[&str]) -> String {
    let hash: String = app.fetch_scalar(HASH).await;
    assert!(hash.starts_with("$argon2id$v=19$m="), "{hash}");
    let everything = "select string_agg(line, ' ') from (
        select users::text from users
        union all select sessions::text from sessions
        union all select todos::text from todos
    ) as lines (line)";
    let everything: String = app.fetch_scalar(everything).await;
    assert!(everything.contains(&hash), "the dump contains all columns");
    for password in passwords {
        assert!(!everything.contains(password), "{everything}");
    }
    hash
}

#[tokio::test]
async fn a_password_is_stored_only_as_an_argon2id_hash() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let at_sign_up = assert_stored_only_as_hash(&app, &[PASSWORD]).await;
    ana.update_user(own_user("new", "new@example.com"), None).await;
    assert_eq!(assert_stored_only_as_hash(&app, &[PASSWORD]).await, at_sign_up);
    ana.change_password(PASSWORD, NEW_PASSWORD).await;
    let changed = assert_stored_only_as_hash(&app, &[PASSWORD, NEW_PASSWORD]).await;
    ana.change_password(NEW_PASSWORD, PASSWORD).await;
    let again = assert_stored_only_as_hash(&app, &[PASSWORD, NEW_PASSWORD]).await;
    assert!(again != changed && again != at_sign_up, "each hash has its own salt");
}

#[tokio::test]
async fn the_default_argon2_parameters_meet_the_owasp_minimum() {
    let settings = config_with(|config| {
        config.tokens.argon2_params = Params::DEFAULT;
    });
    let app = App::start_with(settings).await;
    app.create_user("ana").await;
    let hash: String = app.fetch_scalar(HASH).await;
    let parameters = hash.split('$').nth(3).expect("parameters").split(',');
    for (parameter, (name, minimum)) in parameters.zip([("m=", 19_456), ("t=", 2), ("p=", 1)]) {
        let value = parameter.strip_prefix(name).and_then(|value| value.parse::<u32>().ok());
        assert!(value.is_some_and(|value| value >= minimum), "{hash}");
    }
}

#[tokio::test]
async fn a_login_rehashes_the_password_if_the_argon2_parameters_changed() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old: String = app.fetch_scalar(HASH).await;
    let version = "select password_version from users";
    let before: i64 = app.fetch_scalar(version).await;
    assert!(can_log_in(&app, PASSWORD).await);
    assert_eq!(app.fetch_scalar::<String>(HASH).await, old, "the parameters are the same");

    let params = Params::new(64, 3, 2, Some(32)).expect("valid parameters");
    let other = app
        .start_replica_with(config_with(|config| {
            config.tokens.argon2_params = params;
        }))
        .await;
    let anonymous = app.anonymous().with_channel(&other.channel);
    let rejected = anonymous.try_log_in("ana", "wrong password").await;
    assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
    assert_eq!(app.fetch_scalar::<String>(HASH).await, old, "the password was wrong");

    anonymous.try_log_in("ana", PASSWORD).await.expect("logged in");
    let new: String = app.fetch_scalar(HASH).await;
    assert!(new.starts_with("$argon2id$v=19$m=64,t=3,p=2$"), "{new}");
    assert_eq!(app.fetch_scalar::<i64>(version).await, before);
    assert!(ana.is_session_active().await);
    assert_eq!(Some(ana.get_user("me").await), ana.user);
    anonymous.try_log_in("ana", PASSWORD).await.expect("logged in");
    assert_eq!(app.fetch_scalar::<String>(HASH).await, new);
    assert!(can_log_in(&app, PASSWORD).await, "also with the previous parameters");
}

#[tokio::test]
async fn a_tampered_hash_does_not_crash_the_server() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for tamper in [
        "update users set password_hash = regexp_replace(password_hash, 'm=.*t=\\d+', 'm=262145,t=1')",
        "update users set password_hash = regexp_replace(password_hash, 'm=.*t=\\d+', 'm=4194304,t=1')",
        "update users set password_hash = regexp_replace(password_hash, 'm=.*t=\\d+', 'm=8,t=17')",
        "update users set password_hash = regexp_replace(password_hash, 'm=.*t=\\d+', 'm=8,t=4294967295')",
        "update users set password_hash = regexp_replace(password_hash, '[^$]+$', '')",
        "update users set password_hash = replace(password_hash, 'argon2id', 'argon2i')",
        "update users set password_hash = 'correct horse battery'",
        "update users set password_hash = ''",
    ] {
        app.execute(tamper).await;
        let started = Instant::now();
        let login = assert_status(
            app.anonymous().try_log_in("ana", PASSWORD).await,
            Code::Internal,
            "INTERNAL",
        );
        let change = ana.try_change_password(PASSWORD, NEW_PASSWORD).await;
        let change = assert_status(change, Code::Internal, "INTERNAL");
        assert!(started.elapsed() < Duration::from_secs(2), "{tamper}");
        assert_eq!((login.message(), change.message()), ("Internal error", "Internal error"));
    }
    app.signed_up("bob").await;
}
