//! Page tokens.

use fast_zero::proto::{
    todo::v1::{ListTodosRequest, TodoState},
    user::v1::ListUsersRequest,
};

use super::insert_alike;
use crate::support::{App, assert::assert_invalid};

#[tokio::test]
async fn a_page_token_is_valid_only_for_its_list() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    for caller in [&ana, &bob] {
        insert_alike(&app, caller).await;
    }
    let request = ListTodosRequest {
        title: "a".into(),
        states: vec![TodoState::Draft.into()],
        order_by: "title".into(),
        page_size: 1,
        ..<_>::default()
    };
    let page_token = ana.list_todos(request.clone()).await.next_page_token;
    let request = ListTodosRequest { page_token, ..request };
    let of = |change: fn(&mut ListTodosRequest)| {
        let mut request = request.clone();
        change(&mut request);
        request
    };
    assert_invalid(bob.try_list_todos(request.clone()).await, &["page_token"]);
    for other in [
        of(|request| request.title = "b".into()),
        of(|request| request.title.clear()),
        of(|request| request.description = "a".into()),
        of(|request| (request.title, request.description) = (String::new(), "a".into())),
        of(|request| request.states = vec![TodoState::Draft.into(), TodoState::Done.into()]),
        of(|request| request.states.clear()),
        of(|request| request.order_by = "title desc".into()),
        of(|request| request.order_by = "update_time".into()),
        of(|request| request.order_by.clear()),
    ] {
        assert_invalid(ana.try_list_todos(other).await, &["page_token"]);
    }
    for same in [
        of(|_| ()),
        of(|request| request.page_size = 2),
        of(|request| request.page_size = 0),
        of(|request| request.skip = 1),
    ] {
        ana.try_list_todos(same).await.expect("the list of the token");
    }
}

#[tokio::test]
async fn a_forged_page_token_is_rejected() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.create_user("bob").await;
    insert_alike(&app, &ana).await;
    let of_users = ListUsersRequest { page_size: 1, ..<_>::default() };
    let of_users = ana.users().list_users(of_users).await.expect("listed").into_inner();
    let page = ana.list_todos(ListTodosRequest { page_size: 1, ..<_>::default() }).await;
    let valid = page.next_page_token;
    let turned: String = valid.chars().rev().collect();
    let other_case: String =
        valid.chars().map(|c| if c.is_lowercase() { c.to_ascii_uppercase() } else { c }).collect();
    for invalid in [
        "x",
        "garbage!",
        "0",
        "🦀",
        "\0",
        " ",
        &valid[1..],
        &valid[..valid.len() - 1],
        &valid[..10],
        &format!("{valid}A"),
        &format!("{valid}="),
        &format!("{valid} "),
        &valid.repeat(2),
        &turned,
        &other_case,
        &"A".repeat(valid.len()),
        &"A".repeat(10_000),
        &of_users.next_page_token,
    ] {
        let request = ListTodosRequest { page_token: invalid.to_owned(), ..<_>::default() };
        assert_invalid(ana.try_list_todos(request).await, &["page_token"]);
    }
}
