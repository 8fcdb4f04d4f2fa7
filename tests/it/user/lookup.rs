//! Looking up accounts.

use fast_zero::proto::user::v1::User;
use tonic::Code;
use uuid::Uuid;

use crate::support::{
    App,
    assert::{assert_invalid, assert_status},
    users::own_user,
};

#[tokio::test]
async fn a_user_is_looked_up_by_id_and_only_the_owner_sees_the_email() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (ana_user, bob_user) = (ana.user.clone(), bob.user.clone().expect("a user"));
    assert_eq!(Some(ana.get_user("me").await), ana_user);
    assert_eq!(Some(ana.get_user(&ana.user_id()).await), ana_user);
    let seen = ana.get_user(&bob.user_id()).await;
    assert_eq!(seen, User { email: String::new(), ..bob_user });

    let unknown = ana.try_get_user(&Uuid::now_v7().to_string()).await;
    let unknown = assert_status(unknown, Code::NotFound, "USER_NOT_FOUND");
    assert_eq!(unknown.message(), "User not found");
}

#[tokio::test]
async fn an_id_has_one_spelling() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let id = ana.user_id();
    for invalid in [
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
        assert_invalid(ana.try_get_user(invalid).await, &["id"]);
        assert_invalid(ana.try_delete_user(invalid, "").await, &["id"]);
        let user = User { id: invalid.to_owned(), ..own_user("new", "") };
        assert_invalid(ana.try_update_user(Some(user), None).await, &["user.id"]);
    }
    assert_eq!(Some(ana.get_user("me").await), ana.user);
}
