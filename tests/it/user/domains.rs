//! Email addresses of international domains (IDNA, UTS 46).

use tonic::Code;

use crate::support::{
    App, Client, PASSWORD, RpcResult,
    assert::{assert_invalid, assert_status},
    users::own_user,
};

fn assert_email_exists<T: std::fmt::Debug>(result: RpcResult<T>) {
    assert_status(result, Code::AlreadyExists, "EMAIL_EXISTS");
}

/// Signs up, and then stores the address as version 0.1.0 does: its domain as typed, in
/// lowercase, and all of it folded by case.
async fn sign_up_as_0_1_0(app: &App, username: &str, email: &str, folded: &str) -> Client {
    let client = app.signed_up(username).await;
    let user = client.get_user("me").await;
    sqlx::query("update users set email = $2, email_folded = $3 where id = $1::uuid")
        .bind(user.id)
        .bind(email)
        .bind(folded)
        .execute(&mut app.connect_database().await)
        .await
        .expect("stored");
    client
}

#[tokio::test]
async fn all_spellings_of_a_domain_are_one_address() {
    let app = App::start().await;
    let user = app.anonymous().sign_up("joe", "Jo@XN--MNCHEN-3YA.de", PASSWORD).await;
    assert_eq!(user.email, "Jo@münchen.de");
    let spellings =
        ["jo@münchen.de", "JO@MÜNCHEN.DE", "jo@mu\u{308}nchen.de", "jo@xn--mnchen-3ya.de"];
    for spelling in spellings {
        assert_eq!(app.logged_in(spelling).await.get_user("me").await, user, "{spelling}");
        assert_email_exists(app.anonymous().try_sign_up("bob", spelling, PASSWORD).await);
        let taken = app.anonymous().try_sign_up("JOE", spelling, PASSWORD).await;
        assert_status(taken, Code::AlreadyExists, "USERNAME_EXISTS");
    }
    let ana = app.signed_up("ana").await;
    for spelling in spellings {
        let rejected = ana.try_update_user(Some(own_user("", spelling)), None).await;
        assert_email_exists(rejected);
    }
    let jo = app.logged_in("joe").await;
    assert_eq!(jo.update_user(own_user("", spellings[3]), None).await.email, "jo@münchen.de");
}

#[tokio::test]
async fn domains_that_differ_under_idna_are_different_addresses() {
    let app = App::start().await;
    let sharp = app.anonymous().sign_up("ana", "a@straße.de", PASSWORD).await;
    let double = app.anonymous().sign_up("bob", "a@strasse.de", PASSWORD).await;
    assert_eq!((&*sharp.email, &*double.email), ("a@straße.de", "a@strasse.de"));
    for (login, user) in
        [("A@STRAẞE.de", &sharp), ("a@xn--strae-oqa.de", &sharp), ("A@STRASSE.DE", &double)]
    {
        assert_eq!(&app.logged_in(login).await.get_user("me").await, user, "{login}");
    }
}

#[tokio::test]
async fn a_domain_that_idna_does_not_allow_is_rejected() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for email in ["a@xn--a.com", "a@xn--.com", "a@\u{301}a.com", "a@\u{200d}.com"] {
        assert_invalid(app.anonymous().try_sign_up("bob", email, PASSWORD).await, &["email"]);
        let update = ana.try_update_user(Some(own_user("", email)), None).await;
        assert_invalid(update, &["user.email"]);
    }
}

#[tokio::test]
async fn rows_of_version_0_1_0_are_found_and_not_duplicated() {
    let app = App::start().await;
    let rows = [
        ("ana", "jo@xn--mnchen-3ya.de", "jo@xn--mnchen-3ya.de", "jo@münchen.de"),
        ("bob", "a@straße.de", "a@strasse.de", "a@xn--strae-oqa.de"),
        // No domain under IDNA.
        ("cid", "c@xn--a.com", "c@xn--a.com", "C@xn--A.com"),
    ];
    for (username, email, folded, spelling) in rows {
        let client = sign_up_as_0_1_0(&app, username, email, folded).await;
        let user = client.get_user("me").await;
        for login in [email, spelling] {
            assert_eq!(app.logged_in(login).await.get_user("me").await, user, "{login}");
        }
    }
    for (_, email, _, spelling) in &rows[..2] {
        for email in [email, spelling] {
            assert_email_exists(app.anonymous().try_sign_up("new", email, PASSWORD).await);
        }
    }
    // The user's own address in the other form is no conflict.
    let ana = app.logged_in("ana").await;
    assert_eq!(ana.update_user(own_user("", rows[0].3), None).await.email, rows[0].3);
}

#[tokio::test]
async fn a_row_of_version_0_1_0_does_not_block_another_domain() {
    let app = App::start().await;
    sign_up_as_0_1_0(&app, "ana", "a@straße.de", "a@strasse.de").await;
    sign_up_as_0_1_0(&app, "cid", "b@straße.de", "b@strasse.de").await;
    // The login finds no row of another address.
    let wrong = app.anonymous().try_log_in("a@strasse.de", PASSWORD).await;
    assert_status(wrong, Code::Unauthenticated, "INCORRECT_CREDENTIALS");
    let bob = app.anonymous().sign_up("bob", "a@strasse.de", PASSWORD).await;
    let updated = app.logged_in("bob").await.update_user(own_user("", "b@strasse.de"), None).await;
    assert_eq!((updated.id, &*updated.email), (bob.id, "b@strasse.de"));
    for (login, username) in
        [("a@straße.de", "ana"), ("b@straße.de", "cid"), ("b@strasse.de", "bob")]
    {
        assert_eq!(app.logged_in(login).await.get_user("me").await.username, username);
    }
}

#[tokio::test]
async fn two_rows_of_version_0_1_0_with_one_address_both_log_in() {
    let app = App::start().await;
    sign_up_as_0_1_0(&app, "ana", "jo@münchen.de", "jo@münchen.de").await;
    let ascii = "jo@xn--mnchen-3ya.de";
    sign_up_as_0_1_0(&app, "bob", ascii, ascii).await;
    for (login, username) in [("jo@münchen.de", "ana"), (ascii, "bob")] {
        assert_eq!(app.logged_in(login).await.get_user("me").await.username, username);
    }
}

#[tokio::test]
async fn an_address_that_version_0_1_0_has_accepted_again_is_no_internal_error() {
    let app = App::start().await;
    app.anonymous().sign_up("ana", "a@straße.de", PASSWORD).await;
    sign_up_as_0_1_0(&app, "bob", "a@straße.de", "a@strasse.de").await;
    assert_email_exists(app.anonymous().try_sign_up("cid", "a@strasse.de", PASSWORD).await);
}
