//! Listing accounts.

use std::collections::{BTreeSet, VecDeque};

use fast_zero::proto::{todo::v1::ListTodosRequest, user::v1::ListUsersRequest};

use super::UNKNOWN_USER_ID;
use crate::support::{App, Client, assert::assert_invalid, users::usernames};

/// Returns the names on all consecutive pages.
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
async fn users_are_listed_in_order_of_sign_up_with_only_the_callers_email() {
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
    app.insert_users(1_001).await;
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
async fn all_invalid_fields_of_a_list_are_reported() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for (page_size, skip, page_token, invalid) in [
        (-1, 0, "", &["page_size"][..]),
        (0, -1, "", &["skip"]),
        (i32::MIN, i32::MIN, "x", &["page_size", "skip", "page_token"]),
    ] {
        let request = ListUsersRequest { page_size, skip, page_token: page_token.into() };
        assert_invalid(ana.try_list_users(request).await, invalid);
    }

    let of = async |caller: &Client, page_token: &str| {
        caller
            .try_list_users(ListUsersRequest { page_token: page_token.into(), ..<_>::default() })
            .await
    };
    let page = ListUsersRequest { page_size: 1, ..<_>::default() };
    let valid = ana.list_users(page.clone()).await.next_page_token;
    ana.create_todo("one").await;
    ana.create_todo("two").await;
    let of_todos = ListTodosRequest { page_size: 1, ..<_>::default() };
    let of_todos = ana.list_todos(of_todos).await.next_page_token;
    for invalid in [
        "garbage",
        "\0",
        "🦀",
        &valid[1..],
        &valid[..valid.len() - 1],
        &format!("{valid}A"),
        &valid.to_uppercase(),
        &"A".repeat(valid.len()),
        &of_todos,
        UNKNOWN_USER_ID,
        &ana.user_id(),
    ] {
        assert_invalid(of(&ana, invalid).await, &["page_token"]);
    }
    assert_invalid(of(&bob, &valid).await, &["page_token"]);
    let again = app.logged_in("ana").await;
    assert_eq!(of(&again, &valid).await.expect("the same caller").into_inner().users.len(), 1);
}

#[tokio::test]
async fn skip_omits_users_before_a_page() {
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
async fn remaining_users_are_listed_once_during_sign_ups_and_deletions() {
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
        // The last user of the page, and a user of a later page.
        for user in [leave.pop_front(), leave.pop_back()].into_iter().flatten() {
            user.try_delete_user("me", "").await.expect("deleted");
        }
        // Only once, so that the list ends.
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
