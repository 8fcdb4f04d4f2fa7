//! Request IDs.

use tonic_types::StatusExt;

use super::{GET_TODO, LIST_TODOS};
use crate::support::{App, RpcResult, raw_client::RawClient};

/// Returns the request id in the metadata of the response or the error.
fn returned<T>(response: &RpcResult<T>) -> String {
    let metadata = match response {
        Ok(response) => response.metadata(),
        Err(status) => status.metadata(),
    };
    let mut ids = metadata.get_all("x-request-id").iter();
    let id = ids.next().and_then(|id| id.to_str().ok()).expect("a request id").to_owned();
    assert!(ids.next().is_none(), "one request id");
    id
}

#[tokio::test]
async fn a_request_id_of_1_to_128_visible_characters_is_returned() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let anonymous = app.raw_client().await;
    let with_token = anonymous.clone().with_token_of(&ana);
    let visible: String = ('!'..='~').collect();
    let longest = "x".repeat(128);
    for id in ["a", "req-1/2:3", &visible, &longest] {
        let responses = async |caller: &RawClient| {
            let caller = caller.clone().with_metadata("x-request-id", id);
            [
                caller.call(LIST_TODOS, &[]).await,
                caller.call(GET_TODO, &[]).await,
                caller.call(GET_TODO, b"\xff").await,
                caller.call("/no.such.Service/Method", &[]).await,
                caller.call("/grpc.health.v1.Health/Check", &[]).await,
                caller.call("/grpc.health.v1.Health/Check", b"\x0a\x01x").await,
            ]
        };
        for response in responses(&with_token).await.into_iter().chain(responses(&anonymous).await)
        {
            assert_eq!(returned(&response), id);
            if let Err(status) = response {
                let info = status.get_details_request_info().expect("details");
                assert_eq!(info.request_id, id);
            }
        }
    }
}

#[tokio::test]
async fn any_other_request_id_is_replaced_by_a_generated_one() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let raw = app.raw_client().await.with_token_of(&ana);
    let too_long = "x".repeat(129);
    let mut made = vec![returned(&raw.call(LIST_TODOS, &[]).await)];
    for invalid in ["", " ", "a b", " a", "a ", &too_long] {
        let caller = raw.clone().with_metadata("x-request-id", invalid);
        for response in [caller.call(LIST_TODOS, &[]).await, caller.call(GET_TODO, &[]).await] {
            let id = returned(&response);
            assert_ne!(id, invalid);
            made.push(id);
        }
    }
    assert!(made.iter().all(|id| (1..=128).contains(&id.len())));
    made.sort();
    made.dedup();
    assert_eq!(made.len(), 13, "each call has its own id");
}
