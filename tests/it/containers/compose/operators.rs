//! The operator's command in a container.

use serde_json::Value;

use super::{APP, BASE};
use crate::support::compose::{Stack, is_engine_available};

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_operator_works_in_the_container_of_the_service() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::started(&[BASE]).await;
    stack.anonymous().await.create_user("ana").await;
    let user = ["exec", "-T", APP, "fast-zero", "user"];
    let list = stack.compose(&[&user[..], &["list", "--json"]].concat()).await;
    let list: Value = serde_json::from_str(&list).expect("JSON");
    assert_eq!(list["users"][0]["username"], "ana");
    let code = stack.compose(&[&user[..], &["reset-password", "ana"]].concat()).await;
    let code = code.lines().find(|line| line.starts_with("fzr_")).expect("a code");
    stack.anonymous().await.reset_password(code, "a new password").await;
}
