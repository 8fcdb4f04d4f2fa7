//! Updating accounts.

use std::collections::BTreeSet;

use fast_zero::proto::{auth::v1::LogoutScope, user::v1::User};
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    App, PASSWORD, READ_ONLY_PATHS,
    assert::{assert_invalid, assert_status},
    time::to_system_time,
    users::own_user,
};

#[tokio::test]
async fn an_update_changes_the_fields_of_its_mask_or_those_that_are_set() {
    let app = App::start().await;
    for (n, (mask, username, email, changed)) in [
        (None, "new", "", "username"),
        (None, "", "new", "email"),
        (None, "new", "new", "both"),
        (Some(&[][..]), "new", "", "username"),
        (Some(&[]), "new", "new", "both"),
        (Some(&["username"]), "new", "", "username"),
        (Some(&["username"]), "new", "new", "username"),
        (Some(&["email"]), "new", "new", "email"),
        (Some(&["email", "username"]), "new", "new", "both"),
        (Some(&["*"]), "new", "new", "both"),
        // Fields outside the mask may be invalid.
        (Some(&["username"]), "new", "invalid@", "username"),
    ]
    .into_iter()
    .enumerate()
    {
        let ana = app.signed_up(&format!("ana{n}")).await;
        let old = ana.get_user("me").await;
        let new_username = format!("New.{n}");
        let new_email = format!("New.{n}@example.com");
        let user = own_user(
            if username.is_empty() { "" } else { &new_username },
            match email {
                "new" => &new_email,
                other => other,
            },
        );
        let updated = ana.update_user(user, mask).await;
        let is_changed = |field| changed == field || changed == "both";
        let username = if is_changed("username") { &new_username } else { &old.username };
        let email = if is_changed("email") { &new_email } else { &old.email };
        assert_eq!((&updated.username, &updated.email), (username, email), "{n}");
        assert_eq!((&updated.id, updated.create_time), (&old.id, old.create_time));
        assert_eq!(ana.get_user("me").await, updated);
    }
}

#[tokio::test]
async fn an_update_without_a_mask_ignores_read_only_fields() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.get_user("me").await;
    let user = User {
        create_time: Some(<_>::default()),
        update_time: Some(<_>::default()),
        ..own_user("new", "")
    };
    let updated = ana.update_user(user, None).await;
    assert_eq!((&*updated.username, updated.create_time), ("new", old.create_time));
    assert!(to_system_time(updated.update_time) > to_system_time(old.update_time));
}

/// AIP-203: a client may send back what it read.
#[tokio::test]
async fn read_only_fields_in_a_mask_are_ignored() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mask = ["id", "username", "create_time", "update_time"];
    let updated = ana.update_user(own_user("new", ""), Some(&mask)).await;
    assert_eq!(&*updated.username, "new");

    // Every path of the message, as generated clients send them.
    let mask = [&["username", "email"], &READ_ONLY_PATHS[..]].concat();
    let new = User { username: "newer".into(), ..updated };
    let updated = ana.update_user(new, Some(&mask)).await;
    assert_eq!((&*updated.username, &*updated.email), ("newer", "ana@example.com"));
}

#[tokio::test]
async fn all_invalid_fields_of_an_update_are_reported_and_nothing_changes() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let long = "a".repeat(33);
    for (mask, username, email, invalid) in [
        (None, "", "", &["update_mask"][..]),
        (Some(&[][..]), "", "", &["update_mask"]),
        (Some(&["id"]), "new", "", &["update_mask"]),
        (Some(&["create_time"]), "new", "", &["update_mask"]),
        (Some(&["update_time"]), "new", "", &["update_mask"]),
        (Some(&["etag"]), "new", "", &["update_mask"]),
        (Some(&["password"]), "new", "", &["update_mask"]),
        (Some(&["id", "nothing"]), "new", "", &["update_mask"]),
        (Some(&["id", "update_time.nanos", "etag"]), "new", "", &["update_mask"]),
        (Some(&["username", "etag.x"]), "new", "", &["update_mask"]),
        (Some(&["user.username"]), "new", "", &["update_mask"]),
        (Some(&["Username"]), "new", "", &["update_mask"]),
        (Some(&["username", ""]), "new", "", &["update_mask"]),
        (Some(&["*", "username"]), "new", "", &["update_mask"]),
        (Some(&["username", "*"]), "new", "new@example.com", &["update_mask"]),
        (Some(&["username"]), "", "", &["user.username"]),
        (Some(&["email"]), "", "", &["user.email"]),
        (Some(&["*"]), "new", "", &["user.email"]),
        (Some(&["*"]), "", "", &["user.username", "user.email"]),
        (None, &long, "new", &["user.username", "user.email"]),
        (None, "josé", "", &["user.username"]),
        (None, "ana🦀", "", &["user.username"]),
        (None, "", "Ana <new@example.com>", &["user.email"]),
    ] {
        let rejected = ana.try_update_user(Some(own_user(username, email)), mask).await;
        assert_invalid(rejected, invalid);
    }
    let all_bad = User { id: "x".into(), ..own_user("a", "a") };
    let rejected = ana.try_update_user(Some(all_bad), Some(&["*"])).await;
    assert_invalid(rejected, &["user.id", "user.username", "user.email"]);

    for (mask, invalid) in [
        (None, &["user"][..]),
        (Some(&["username"][..]), &["user"]),
        (Some(&["id"]), &["user", "update_mask"]),
    ] {
        assert_invalid(ana.try_update_user(None, mask).await, invalid);
    }
    assert_eq!(Some(ana.get_user("me").await), ana.user);
}

#[tokio::test]
async fn the_callers_own_values_do_not_conflict_but_those_of_others_do_in_any_case() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.anonymous().sign_up("Bob", "José@example.com", PASSWORD).await;
    for (username, email) in [
        ("ana", "ana@example.com"),
        ("ANA", "ANA@example.com"),
        ("ana", ""),
        ("", "ana@EXAMPLE.com"),
    ] {
        ana.update_user(own_user(username, email), None).await;
    }
    let before = ana.get_user("me").await;
    assert_eq!((&*before.username, &*before.email), ("ana", "ana@example.com"));
    for (username, email, reason, message) in [
        ("Bob", "", "USERNAME_EXISTS", "Username already exists"),
        ("bOB", "new@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("", "José@example.com", "EMAIL_EXISTS", "Email already exists"),
        ("new", "JOSÉ@Example.Com", "EMAIL_EXISTS", "Email already exists"),
        ("bob", "josé@example.com", "USERNAME_EXISTS", "Username already exists"),
    ] {
        let rejected = ana.try_update_user(Some(own_user(username, email)), None).await;
        let rejected = assert_status(rejected, Code::AlreadyExists, reason);
        assert_eq!(rejected.message(), message);
    }
    assert_eq!(ana.get_user("me").await, before);
}

#[tokio::test]
async fn only_the_callers_own_account_can_be_updated_or_deleted() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for id in [bob.user_id(), Uuid::now_v7().to_string()] {
        // Permission comes before conflicts and etags, but after validation.
        for (username, etag) in [("new", ""), ("bob", ""), ("ana", "garbage")] {
            let user = User { id: id.clone(), etag: etag.into(), ..own_user(username, "") };
            let rejected = ana.try_update_user(Some(user), None).await;
            let rejected =
                assert_status(rejected, Code::PermissionDenied, "NOT_ENOUGH_PERMISSIONS");
            assert_eq!(rejected.message(), "Not enough permissions");
            let rejected = ana.try_delete_user(&id, etag).await;
            let rejected =
                assert_status(rejected, Code::PermissionDenied, "NOT_ENOUGH_PERMISSIONS");
            assert_eq!(rejected.message(), "Not enough permissions");
        }
        let user = User { id, ..own_user("x", "") };
        assert_invalid(ana.try_update_user(Some(user), None).await, &["user.username"]);
    }
    assert_eq!(Some(bob.get_user("me").await), bob.user);
}

#[tokio::test]
async fn an_etag_mismatch_rejects_updates_and_deletions() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let stale = ana.get_user("me").await.etag;
    let user = ana.update_user(User { etag: stale.clone(), ..own_user("new", "") }, None).await;
    let valid = user.etag.clone();
    for etag in [
        stale,
        "garbage".into(),
        " ".into(),
        "0".into(),
        "-1".into(),
        "\0".into(),
        "🦀".into(),
        "99999999999999999999".into(),
        format!("{valid} "),
        format!("0{valid}"),
        format!("+{valid}"),
        format!("\"{valid}\""),
        format!("{valid}{valid}"),
    ] {
        let other = User { etag: etag.clone(), ..own_user("other", "") };
        let rejected = ana.try_update_user(Some(other), None).await;
        assert_status(rejected, Code::Aborted, "ETAG_MISMATCH");
        let rejected = ana.try_delete_user("me", &etag).await;
        assert_status(rejected, Code::Aborted, "ETAG_MISMATCH");
    }
    assert_eq!(ana.get_user("me").await, user);
    ana.try_delete_user("me", &valid).await.expect("a matching etag");
    assert!(!ana.is_session_active().await);
}

#[tokio::test]
async fn an_update_with_equal_values_still_creates_a_new_version() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut last = ana.get_user("me").await;
    let mut etags = BTreeSet::from([last.etag.clone()]);
    for (username, email) in
        [("new", ""), ("new", ""), ("", "new@example.com"), ("ana", "ana@example.com")]
    {
        let user = ana.update_user(own_user(username, email), None).await;
        assert!(to_system_time(user.update_time) > to_system_time(last.update_time));
        assert!(etags.insert(user.etag.clone()), "{} again", user.etag);
        last = user;
    }
}

#[tokio::test]
async fn an_email_change_neither_revokes_nor_restores_sessions() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (other, revoked) = (app.logged_in("ana").await, app.logged_in("ana").await);
    revoked.log_out(LogoutScope::ThisSession).await;
    ana.update_user(own_user("", "new@example.com"), None).await;

    // Another user now has the old email.
    let bob = app.anonymous().sign_up("bob", "ana@example.com", PASSWORD).await;
    for session in [&ana, &other] {
        let user = session.get_user("me").await;
        assert_eq!((user.id, &*user.email), (ana.user_id(), "new@example.com"));
    }
    let refreshed = other.refresh(&other.tokens().refresh_token).await;
    assert_eq!(
        other.clone().with_token(&refreshed.access_token).get_user("me").await.username,
        "ana"
    );
    assert!(!revoked.is_session_active().await);
    assert_eq!(app.logged_in("ana@example.com").await.get_user("me").await, bob);
    assert_eq!(app.logged_in("new@example.com").await.get_user("me").await.id, ana.user_id());

    // After a change back to the first email, revoked sessions stay revoked.
    ana.update_user(own_user("", "ana2@example.com"), None).await;
    assert!(!revoked.is_session_active().await);
}
