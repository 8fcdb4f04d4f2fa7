//! Accounts: signing up, looking up, changing and deleting them.

use std::{
    collections::{BTreeSet, VecDeque},
    time::SystemTime,
};

use fast_zero::proto::{
    auth::v1::LogoutScope,
    todo::v1::ListTodosRequest,
    user::v1::{ListUsersRequest, User},
};
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    App, Client, PASSWORD,
    assert::{assert_invalid, assert_refused, assert_unauthenticated},
    text::control_characters,
    time::{assert_since, system_time, time_in},
    users::{me, usernames},
};

const NOBODY: &str = "01890000-0000-7000-8000-000000000000";

#[tokio::test]
async fn a_sign_up_answers_with_the_account_as_it_is_kept() {
    let app = App::start().await;
    let begun = SystemTime::now();
    let user =
        app.anonymous().sign_up("Ana.Luz_9-", " Ana.Luz@EXÂMPLE.Com\u{3000}", PASSWORD).await;
    assert_eq!((&*user.username, &*user.email), ("Ana.Luz_9-", "Ana.Luz@exâmple.com"));
    assert_eq!(user.id, Uuid::parse_str(&user.id).expect("a UUID").to_string());
    assert_eq!(user.create_time, Some(time_in(&user.id)));
    assert_since(begun, <_>::default(), user.create_time);
    assert_since(begun, <_>::default(), user.update_time);
    assert!(!user.etag.is_empty());
    assert_eq!(app.logged_in("ana.luz_9-").await.get_user("me").await, user);
}

#[tokio::test]
async fn ids_rise_with_the_time_of_sign_up() {
    let app = App::start().await;
    let mut last = String::new();
    for username in ["dan", "cid", "bob", "ana"] {
        let user = app.create_user(username).await;
        assert!(user.id > last, "{} after {last}", user.id);
        assert_eq!(user.create_time, Some(time_in(&user.id)));
        last = user.id;
    }
}

#[tokio::test]
async fn every_bad_field_of_a_sign_up_is_named_at_once() {
    let app = App::start().await;
    let anonymous = app.anonymous();
    assert_invalid(anonymous.try_sign_up("", "", "").await, &["username", "email", "password"]);
    let refused = anonymous.try_sign_up("ana", "ana@example", "short").await;
    assert_invalid(refused, &["email", "password"]);

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
        let refused = anonymous.try_sign_up(username, "ana@example.com", PASSWORD).await;
        assert_invalid(refused, &["username"]);
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
        let refused = anonymous.try_sign_up("ana", email, PASSWORD).await;
        assert_invalid(refused, &["email"]);
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
        let refused = anonymous.try_sign_up("ana", "ana@example.com", password).await;
        assert_invalid(refused, &["password"]);
    }
    assert_eq!(app.select::<i64>("select count(*) from users").await, 0);
}

/// A good address but for its length.
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
async fn names_and_passwords_may_be_as_long_and_as_odd_as_the_rules_allow() {
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
async fn an_address_is_kept_in_composed_form() {
    let app = App::start().await;
    let user = app.anonymous().sign_up("ana", "jose\u{301}@example.com", PASSWORD).await;
    assert_eq!(user.email, "jos\u{e9}@example.com");
    let taken = app.anonymous().try_sign_up("bob", "JOSE\u{301}@example.com", PASSWORD).await;
    assert_refused(taken, Code::AlreadyExists, "EMAIL_EXISTS");
}

#[tokio::test]
async fn no_text_may_hold_control_characters_even_where_trimming_would_cut_them() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for control in control_characters() {
        let (name, email) = (format!("bob{control}"), format!("bob@example.com{control}"));
        let signing_up = ana.try_sign_up(&name, &email, &format!("{PASSWORD}{control}")).await;
        assert_invalid(signing_up, &["username", "email", "password"]);
        let update = ana.try_update_user(Some(me(&name, &email)), None).await;
        assert_invalid(update, &["user.username", "user.email"]);
        let bad = format!("{control}{NOBODY}");
        assert_invalid(ana.try_get_user(&bad).await, &["id"]);
    }
}

#[tokio::test]
async fn a_password_is_not_the_username_or_the_address_in_any_case() {
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
        let refused = app.anonymous().try_sign_up(username, email, password).await;
        assert_invalid(refused, &["password"]);
    }
}

#[tokio::test]
async fn usernames_and_addresses_are_unique_without_regard_to_case() {
    let app = App::start().await;
    app.anonymous().sign_up("Ana", "Ana@example.com", PASSWORD).await;
    app.anonymous().sign_up("bob", "José@example.com", PASSWORD).await;
    for (username, email, reason, message) in [
        ("Ana", "new@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("aNA", "new@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("new", "Ana@example.com", "EMAIL_EXISTS", "Email already exists"),
        ("new", " aNA@EXAMPLE.com ", "EMAIL_EXISTS", "Email already exists"),
        ("new", "JOSÉ@example.com", "EMAIL_EXISTS", "Email already exists"),
        // Both of one user, both of different users, in either order of sign-up.
        ("ana", "ana@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("ana", "josé@example.com", "USERNAME_EXISTS", "Username already exists"),
        ("BOB", "ana@example.com", "USERNAME_EXISTS", "Username already exists"),
    ] {
        let taken = app.anonymous().try_sign_up(username, email, PASSWORD).await;
        let taken = assert_refused(taken, Code::AlreadyExists, reason);
        assert_eq!(taken.message(), message);
    }
    assert_eq!(app.select::<i64>("select count(*) from users").await, 2);
}

#[tokio::test]
async fn the_username_is_named_first_even_after_its_index_was_built_anew() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.create_user("bob").await;
    app.execute("reindex index concurrently users_username_key").await;
    let taken = app.anonymous().try_sign_up("bob", "bob@example.com", PASSWORD).await;
    assert_refused(taken, Code::AlreadyExists, "USERNAME_EXISTS");
    let taken = ana.try_update_user(Some(me("bob", "bob@example.com")), None).await;
    assert_refused(taken, Code::AlreadyExists, "USERNAME_EXISTS");
}

#[tokio::test]
async fn a_user_is_looked_up_by_id_and_shows_their_address_to_nobody_else() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (ana_user, bob_user) = (ana.user.clone(), bob.user.clone().expect("a user"));
    assert_eq!(Some(ana.get_user("me").await), ana_user);
    assert_eq!(Some(ana.get_user(&ana.user_id()).await), ana_user);
    let seen = ana.get_user(&bob.user_id()).await;
    assert_eq!(seen, User { email: String::new(), ..bob_user });

    let unknown = ana.try_get_user(&Uuid::now_v7().to_string()).await;
    let unknown = assert_refused(unknown, Code::NotFound, "USER_NOT_FOUND");
    assert_eq!(unknown.message(), "User not found");
}

#[tokio::test]
async fn an_id_has_one_spelling() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let id = ana.user_id();
    for bad in [
        "",
        "ME",
        " me",
        "0",
        "1",
        "-1",
        "2147483648",
        "9223372036854775808",
        "null",
        "ana",
        "🦀",
        &id.to_uppercase(),
        &id.replace('-', ""),
        &format!("{{{id}}}"),
        &format!("urn:uuid:{id}"),
        &format!(" {id}"),
        &format!("{id} "),
        &format!("{id}0"),
        &id[1..],
    ] {
        assert_invalid(ana.try_get_user(bad).await, &["id"]);
        assert_invalid(ana.try_delete_user(bad, "").await, &["id"]);
        let user = User { id: bad.to_owned(), ..me("new", "") };
        assert_invalid(ana.try_update_user(Some(user), None).await, &["user.id"]);
    }
    assert_eq!(Some(ana.get_user("me").await), ana.user);
}

/// The names on all pages, of which each begins where the one before ended.
async fn listed(caller: &Client, page_size: i32) -> Vec<String> {
    let mut request = ListUsersRequest { page_size, ..<_>::default() };
    let mut listed = Vec::new();
    loop {
        let page = caller.list_users(request.clone()).await;
        listed.extend(page.users.into_iter().map(|user| user.username));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return listed;
        }
    }
}

#[tokio::test]
async fn users_are_listed_by_sign_up_with_the_callers_own_address_only() {
    let app = App::start().await;
    let names = ["dan", "ana", "Eve", "cid", "bob"];
    for name in &names[..4] {
        app.create_user(name).await;
    }
    let bob = app.signed_up("bob").await;
    let page = bob.list_users(<_>::default()).await;
    assert_eq!((usernames(&page.users), &*page.next_page_token), (names.to_vec(), ""));
    for user in page.users {
        let email = if user.username == "bob" { "bob@example.com" } else { "" };
        assert_eq!(user.email, email, "{}", user.username);
        assert_eq!(user, bob.get_user(&user.id).await);
    }
    for page_size in 1..=6 {
        assert_eq!(listed(&bob, page_size).await, names, "{page_size}");
    }
}

#[tokio::test]
async fn a_page_has_100_users_unless_it_asks_for_up_to_1000() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "insert into users select
             ('00000000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'user' || n,
             'user' || n, 'user' || n || '@example.com', 'user' || n || '@example.com',
             'no hash', 1, now(), 1
         from generate_series(1, 1001) n",
    )
    .await;
    for (page_size, count) in
        [(0, 100), (1, 1), (101, 101), (1_000, 1_000), (1_001, 1_000), (i32::MAX, 1_000)]
    {
        let page = ana.list_users(ListUsersRequest { page_size, ..<_>::default() }).await;
        assert_eq!(page.users.len(), count, "{page_size}");
        assert!(!page.next_page_token.is_empty());
    }
    let all = listed(&ana, 0).await;
    assert_eq!((all.len(), &*all[1_001]), (1_002, "ana"));
}

#[tokio::test]
async fn every_bad_field_of_a_list_is_named_at_once() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for (page_size, skip, page_token, bad) in [
        (-1, 0, "", &["page_size"][..]),
        (0, -1, "", &["skip"]),
        (i32::MIN, i32::MIN, "x", &["page_size", "skip", "page_token"]),
    ] {
        let request = ListUsersRequest { page_size, skip, page_token: page_token.into() };
        assert_invalid(ana.try_list_users(request).await, bad);
    }

    let of = async |caller: &Client, page_token: &str| {
        caller
            .try_list_users(ListUsersRequest { page_token: page_token.into(), ..<_>::default() })
            .await
    };
    let page = ListUsersRequest { page_size: 1, ..<_>::default() };
    let good = ana.list_users(page.clone()).await.next_page_token;
    ana.create_todo("one").await;
    ana.create_todo("two").await;
    let of_todos = ListTodosRequest { page_size: 1, ..<_>::default() };
    let of_todos = ana.list_todos(of_todos).await.next_page_token;
    for bad in [
        "garbage",
        "\0",
        "🦀",
        &good[1..],
        &good[..good.len() - 1],
        &format!("{good}A"),
        &good.to_uppercase(),
        &"A".repeat(good.len()),
        &of_todos,
        NOBODY,
        &ana.user_id(),
    ] {
        assert_invalid(of(&ana, bad).await, &["page_token"]);
    }
    assert_invalid(of(&bob, &good).await, &["page_token"]);
    let again = app.logged_in("ana").await;
    assert_eq!(of(&again, &good).await.expect("it is the same caller").into_inner().users.len(), 1);
}

#[tokio::test]
async fn skip_leaves_out_further_users_before_a_page() {
    let app = App::start().await;
    for name in ["user0", "user1", "user2", "user3", "user4", "user5", "user6"] {
        app.create_user(name).await;
    }
    let last = app.signed_up("user7").await;
    let page = async |skip, page_token: &str| {
        let page_token = page_token.to_owned();
        last.list_users(ListUsersRequest { page_size: 2, skip, page_token }).await
    };
    let first = page(1, "").await;
    assert_eq!(usernames(&first.users), ["user1", "user2"]);
    let second = page(2, &first.next_page_token).await;
    assert_eq!(usernames(&second.users), ["user5", "user6"]);
    let third = page(0, &second.next_page_token).await;
    assert_eq!((usernames(&third.users), &*third.next_page_token), (vec!["user7"], ""));
    for (skip, token) in [(8, ""), (i32::MAX, ""), (1, &*second.next_page_token)] {
        let beyond = page(skip, token).await;
        assert_eq!((beyond.users.len(), &*beyond.next_page_token), (0, ""), "{skip}");
    }
}

#[tokio::test]
async fn who_stays_is_listed_once_while_others_sign_up_and_delete_their_accounts() {
    let app = App::start().await;
    let (mut stay, mut leave) = (Vec::new(), VecDeque::new());
    for n in 0..6 {
        stay.push(app.create_user(&format!("stay{n}")).await.username);
        leave.push_back(app.signed_up(&format!("leave{n}")).await);
    }
    let caller = app.logged_in("stay0").await;
    let mut request = ListUsersRequest { page_size: 2, ..<_>::default() };
    let mut seen = Vec::new();
    loop {
        let page = caller.list_users(request.clone()).await;
        seen.extend(page.users.into_iter().map(|user| user.username));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            break;
        }
        // The last one of the page, and one who would have come later.
        for user in [leave.pop_front(), leave.pop_back()].into_iter().flatten() {
            user.try_delete_user("me", "").await.expect("deleted");
        }
        // Once only, or the list would never end.
        if seen.len() == 2 {
            app.create_user("new").await;
        }
    }
    assert_eq!(
        seen.iter().filter(|name| name.starts_with("stay")).collect::<Vec<_>>(),
        stay.iter().collect::<Vec<_>>()
    );
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), seen.len(), "{seen:?}");
}

#[tokio::test]
async fn an_update_changes_what_its_mask_names_or_else_what_it_sets() {
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
        // What the mask does not name may be anything.
        (Some(&["username"]), "new", "bad@", "username"),
    ]
    .into_iter()
    .enumerate()
    {
        let ana = app.signed_up(&format!("ana{n}")).await;
        let old = ana.get_user("me").await;
        let new_username = format!("New.{n}");
        let new_email = format!("New.{n}@example.com");
        let user = me(
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
        ..me("new", "")
    };
    let updated = ana.update_user(user, None).await;
    assert_eq!((&*updated.username, updated.create_time), ("new", old.create_time));
    assert!(system_time(updated.update_time) > system_time(old.update_time));
}

#[tokio::test]
async fn every_bad_field_of_an_update_is_named_at_once_and_nothing_changes() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let long = "a".repeat(33);
    for (mask, username, email, bad) in [
        (None, "", "", &["update_mask"][..]),
        (Some(&[][..]), "", "", &["update_mask"]),
        (Some(&["id"]), "new", "", &["update_mask"]),
        (Some(&["create_time"]), "new", "", &["update_mask"]),
        (Some(&["update_time"]), "new", "", &["update_mask"]),
        (Some(&["etag"]), "new", "", &["update_mask"]),
        (Some(&["password"]), "new", "", &["update_mask"]),
        (Some(&["username", "id"]), "new", "", &["update_mask"]),
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
        let refused = ana.try_update_user(Some(me(username, email)), mask).await;
        assert_invalid(refused, bad);
    }
    let all_bad = User { id: "x".into(), ..me("a", "a") };
    let refused = ana.try_update_user(Some(all_bad), Some(&["*"])).await;
    assert_invalid(refused, &["user.id", "user.username", "user.email"]);

    for (mask, bad) in [
        (None, &["user"][..]),
        (Some(&["username"][..]), &["user"]),
        (Some(&["id"]), &["user", "update_mask"]),
    ] {
        assert_invalid(ana.try_update_user(None, mask).await, bad);
    }
    assert_eq!(Some(ana.get_user("me").await), ana.user);
}

#[tokio::test]
async fn ones_own_current_value_is_no_clash_but_anothers_is_in_any_case() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.anonymous().sign_up("Bob", "José@example.com", PASSWORD).await;
    for (username, email) in [
        ("ana", "ana@example.com"),
        ("ANA", "ANA@example.com"),
        ("ana", ""),
        ("", "ana@EXAMPLE.com"),
    ] {
        ana.update_user(me(username, email), None).await;
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
        let refused = ana.try_update_user(Some(me(username, email)), None).await;
        let refused = assert_refused(refused, Code::AlreadyExists, reason);
        assert_eq!(refused.message(), message);
    }
    assert_eq!(ana.get_user("me").await, before);
}

#[tokio::test]
async fn only_ones_own_account_can_be_changed_or_deleted() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for id in [bob.user_id(), Uuid::now_v7().to_string()] {
        // Permission comes before conflicts and etags, but after validation.
        for (username, etag) in [("new", ""), ("bob", ""), ("ana", "garbage")] {
            let user = User { id: id.clone(), etag: etag.into(), ..me(username, "") };
            let refused = ana.try_update_user(Some(user), None).await;
            let refused = assert_refused(refused, Code::PermissionDenied, "NOT_ENOUGH_PERMISSIONS");
            assert_eq!(refused.message(), "Not enough permissions");
            let refused = ana.try_delete_user(&id, etag).await;
            let refused = assert_refused(refused, Code::PermissionDenied, "NOT_ENOUGH_PERMISSIONS");
            assert_eq!(refused.message(), "Not enough permissions");
        }
        let user = User { id, ..me("x", "") };
        assert_invalid(ana.try_update_user(Some(user), None).await, &["user.username"]);
    }
    assert_eq!(Some(bob.get_user("me").await), bob.user);
}

#[tokio::test]
async fn an_etag_that_does_not_match_stops_updates_and_deletions() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let stale = ana.get_user("me").await.etag;
    let user = ana.update_user(User { etag: stale.clone(), ..me("new", "") }, None).await;
    let good = user.etag.clone();
    for etag in [
        stale,
        "garbage".into(),
        " ".into(),
        "0".into(),
        "-1".into(),
        "\0".into(),
        "🦀".into(),
        "99999999999999999999".into(),
        format!("{good} "),
        format!("0{good}"),
        format!("+{good}"),
        format!("\"{good}\""),
        format!("{good}{good}"),
    ] {
        let other = User { etag: etag.clone(), ..me("other", "") };
        let refused = ana.try_update_user(Some(other), None).await;
        assert_refused(refused, Code::Aborted, "ETAG_MISMATCH");
        let refused = ana.try_delete_user("me", &etag).await;
        assert_refused(refused, Code::Aborted, "ETAG_MISMATCH");
    }
    assert_eq!(ana.get_user("me").await, user);
    ana.try_delete_user("me", &good).await.expect("it matches");
    assert!(!ana.is_alive().await);
}

#[tokio::test]
async fn every_update_is_a_change_even_if_the_values_stay() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut last = ana.get_user("me").await;
    let mut etags = BTreeSet::from([last.etag.clone()]);
    for (username, email) in
        [("new", ""), ("new", ""), ("", "new@example.com"), ("ana", "ana@example.com")]
    {
        let user = ana.update_user(me(username, email), None).await;
        assert!(system_time(user.update_time) > system_time(last.update_time));
        assert!(etags.insert(user.etag.clone()), "{} again", user.etag);
        last = user;
    }
}

#[tokio::test]
async fn a_new_address_neither_ends_sessions_nor_revives_any() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (other, gone) = (app.logged_in("ana").await, app.logged_in("ana").await);
    gone.log_out(LogoutScope::ThisSession).await;
    ana.update_user(me("", "new@example.com"), None).await;

    // The old address now is somebody else's.
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
    assert!(!gone.is_alive().await);
    assert_eq!(app.logged_in("ana@example.com").await.get_user("me").await, bob);
    assert_eq!(app.logged_in("new@example.com").await.get_user("me").await.id, ana.user_id());

    // The first address again: what ended stays ended.
    ana.update_user(me("", "ana2@example.com"), None).await;
    assert!(!gone.is_alive().await);
}

#[tokio::test]
async fn a_deleted_account_takes_everything_with_it_and_frees_its_names() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let other = app.logged_in("ana").await;
    ana.create_todo("mine").await;
    bob.create_todo("mine").await;
    assert!(ana.is_alive().await && other.is_alive().await);

    ana.try_delete_user(&ana.user_id(), "").await.expect("deleted");
    for session in [&ana, &other] {
        assert!(!session.is_alive().await);
        let refused = ana.try_refresh(&session.tokens().refresh_token).await;
        assert_unauthenticated(refused, "REFRESH_TOKEN_INVALID");
    }
    for (rows, left) in [
        ("select count(*) from users", 1),
        ("select count(*) from sessions", 1),
        ("select count(*) from todos", 1),
    ] {
        assert_eq!(app.select::<i64>(rows).await, left, "{rows}");
    }
    assert_unauthenticated(ana.try_log_in("ana", PASSWORD).await, "INCORRECT_CREDENTIALS");
    let gone = bob.try_get_user(&ana.user_id()).await;
    assert_refused(gone, Code::NotFound, "USER_NOT_FOUND");

    let again = app.signed_up("ana").await;
    assert_ne!(again.user_id(), ana.user_id());
    assert!(again.list_todos(<_>::default()).await.todos.is_empty());
    assert!(!ana.is_alive().await);
}
