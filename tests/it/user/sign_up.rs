//! Signing up.

use std::time::SystemTime;

use tonic::Code;
use uuid::Uuid;

use super::UNKNOWN_USER_ID;
use crate::support::{
    App, PASSWORD,
    assert::{assert_invalid, assert_status},
    text::control_characters,
    time::{assert_recent, uuid_timestamp},
    users::own_user,
};

#[tokio::test]
async fn a_sign_up_returns_the_stored_account() {
    let app = App::start().await;
    let started = SystemTime::now();
    let user =
        app.anonymous().sign_up("Ana.Luz_9-", " Ana.Luz@EXÂMPLE.Com\u{3000}", PASSWORD).await;
    assert_eq!((&*user.username, &*user.email), ("Ana.Luz_9-", "Ana.Luz@exâmple.com"));
    assert_eq!(user.id, Uuid::parse_str(&user.id).expect("a UUID").to_string());
    assert_eq!(user.create_time, Some(uuid_timestamp(&user.id)));
    assert_recent(started, <_>::default(), user.create_time);
    assert_recent(started, <_>::default(), user.update_time);
    assert!(!user.etag.is_empty());
    assert_eq!(app.logged_in("ana.luz_9-").await.get_user("me").await, user);
}

#[tokio::test]
async fn ids_are_ascending_in_order_of_sign_up() {
    let app = App::start().await;
    let mut last = String::new();
    for username in ["dan", "cid", "bob", "ana"] {
        let user = app.create_user(username).await;
        assert!(user.id > last, "{} after {last}", user.id);
        assert_eq!(user.create_time, Some(uuid_timestamp(&user.id)));
        last = user.id;
    }
}

#[tokio::test]
async fn all_invalid_fields_of_a_sign_up_are_reported() {
    let app = App::start().await;
    let anonymous = app.anonymous();
    assert_invalid(anonymous.try_sign_up("", "", "").await, &["username", "email", "password"]);
    let rejected = anonymous.try_sign_up("ana", "ana@example", "short").await;
    assert_invalid(rejected, &["email", "password"]);

    for username in [
        "ab",
        &"a".repeat(33),
        ".ana",
        "_ana",
        "-ana",
        "ana luz",
        "ana@example.com",
        "josé",
        "e\u{301}ana",
        "ana🦀",
        "аna",
        "ana/luz",
        "ana%",
        "ａｎａ",
        "٣٣٣",
        &"a".repeat(100_000),
    ] {
        let rejected = anonymous.try_sign_up(username, "ana@example.com", PASSWORD).await;
        assert_invalid(rejected, &["username"]);
    }
    for email in [
        " ",
        "ana",
        "ana@",
        "@example.com",
        "ana@localhost",
        "ana@127.0.0.1",
        "ana@[127.0.0.1]",
        "ana@[IPv6:::1]",
        "Ana <ana@example.com>",
        "<ana@example.com>",
        "\"ana\"@example.com",
        "\"ana luz\"@example.com",
        "ana luz@example.com",
        "ana@exam ple.com",
        "ana@example.com, bob@example.com",
        "ana@bob@example.com",
        "ana@example..com",
        "ana..luz@example.com",
        &address_of(255),
        &"a".repeat(100_000),
    ] {
        let rejected = anonymous.try_sign_up("ana", email, PASSWORD).await;
        assert_invalid(rejected, &["email"]);
    }
    for password in [
        "1234567",
        "🦀🦀🦀🦀🦀🦀🦀",
        // Composed, these are 7 characters.
        &"e\u{301}".repeat(7),
        &"x".repeat(129),
        &"🦀".repeat(129),
        &"x".repeat(100_000),
    ] {
        let rejected = anonymous.try_sign_up("ana", "ana@example.com", password).await;
        assert_invalid(rejected, &["password"]);
    }
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from users").await, 0);
}

/// Returns an email of this length, otherwise valid.
fn address_of(characters: usize) -> String {
    let mut address = format!("{}@", "a".repeat(64));
    while characters - address.len() > 64 {
        address.push_str(&"b".repeat(49));
        address.push('.');
    }
    let rest = characters - address.len() - ".com".len();
    format!("{address}{}.com", "c".repeat(rest))
}

#[tokio::test]
async fn names_and_passwords_at_the_limits_of_the_rules_are_accepted() {
    let app = App::start().await;
    for (username, email, password) in [
        ("abc", "a@b.co", "12345678"),
        (&*"Z".repeat(32), &address_of(254), &"x".repeat(128)),
        ("0._-", "ana+todo@sub.example.com", "        "),
        ("7ana", "o'ana_luz@example.com", &"🦀".repeat(128)),
        ("ana", "josé@exâmple.com", "\u{200d}\u{202e}\u{feff}\u{ffff}' or 1=1 --"),
    ] {
        let user = app.anonymous().sign_up(username, email, password).await;
        assert_eq!((&*user.username, &*user.email), (username, email));
        app.anonymous().try_log_in(username, password).await.expect("logged in");
    }
}

#[tokio::test]
async fn an_email_is_stored_in_composed_form() {
    let app = App::start().await;
    let user = app.anonymous().sign_up("ana", "jose\u{301}@example.com", PASSWORD).await;
    assert_eq!(user.email, "jos\u{e9}@example.com");
    let taken = app.anonymous().try_sign_up("bob", "JOSE\u{301}@example.com", PASSWORD).await;
    assert_status(taken, Code::AlreadyExists, "EMAIL_EXISTS");
}

#[tokio::test]
async fn control_characters_are_rejected_even_where_trimming_would_remove_them() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for control in control_characters() {
        let (name, email) = (format!("bob{control}"), format!("bob@example.com{control}"));
        let signing_up = ana.try_sign_up(&name, &email, &format!("{PASSWORD}{control}")).await;
        assert_invalid(signing_up, &["username", "email", "password"]);
        let update = ana.try_update_user(Some(own_user(&name, &email)), None).await;
        assert_invalid(update, &["user.username", "user.email"]);
        let invalid = format!("{control}{UNKNOWN_USER_ID}");
        assert_invalid(ana.try_get_user(&invalid).await, &["id"]);
    }
}

#[tokio::test]
async fn a_password_equal_to_the_username_or_email_is_rejected_in_any_case() {
    let app = App::start().await;
    for (username, email, password) in [
        ("ana.luz.9", "ana@example.com", "ana.luz.9"),
        ("ana.luz.9", "ana@example.com", "ANA.Luz.9"),
        ("ana", "ana@example.com", "ana@example.com"),
        ("ana", "Ana@EXAMPLE.com", "aNA@example.COM"),
        ("ana", "  ana@example.com ", "ana@example.com"),
        ("ana", "jose\u{301}@example.com", "JOSÉ@example.com"),
        ("ana", "josé@example.com", "jose\u{301}@example.com"),
    ] {
        let rejected = app.anonymous().try_sign_up(username, email, password).await;
        assert_invalid(rejected, &["password"]);
    }
}

#[tokio::test]
async fn usernames_and_emails_are_unique_case_insensitively() {
    let app = App::start().await;
    app.anonymous().sign_up("Ana", "Ana@example.com", PASSWORD).await;
    app.anonymous().sign_up("bob", "José@example.com", PASSWORD).await;
    for (username, email, reason, message) in [
        ("Ana", "new@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("aNA", "new@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("new", "Ana@example.com", "EMAIL_EXISTS", "Email already exists"),
        ("new", " aNA@EXAMPLE.com ", "EMAIL_EXISTS", "Email already exists"),
        ("new", "JOSÉ@example.com", "EMAIL_EXISTS", "Email already exists"),
        // Both conflicts with one user, then with two users in either order of sign-up.
        ("ana", "ana@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("ana", "josé@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("BOB", "ana@example.com", "USERNAME_EXISTS", "Username already exists"),
    ] {
        let taken = app.anonymous().try_sign_up(username, email, PASSWORD).await;
        let taken = assert_status(taken, Code::AlreadyExists, reason);
        assert_eq!(taken.message(), message);
    }
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from users").await, 2);
}

#[tokio::test]
async fn a_username_conflict_is_reported_first_even_after_its_index_is_rebuilt() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.create_user("bob").await;
    app.execute("reindex index concurrently users_username_key").await;
    let taken = app.anonymous().try_sign_up("bob", "bob@example.com", PASSWORD).await;
    assert_status(taken, Code::AlreadyExists, "USERNAME_EXISTS");
    let taken = ana.try_update_user(Some(own_user("bob", "bob@example.com")), None).await;
    assert_status(taken, Code::AlreadyExists, "USERNAME_EXISTS");
}
