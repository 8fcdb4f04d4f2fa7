//! Deadlines.

use std::time::{Duration, Instant};

use fast_zero::proto::todo::v1::Todo;
use tonic::Code;

use super::{LIST_TODOS, UPDATE_TODO, update_of};
use crate::support::{
    App,
    assert::{assert_invalid, assert_status},
};

#[tokio::test]
async fn an_invalid_deadline_is_rejected() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let raw = app.raw_client().await.with_token_of(&ana);
    for invalid in ["", "1", "S", "1s", "-1S", "+1S", "1.5S", "1 S", "123456789S", "soon"] {
        let rejected =
            raw.clone().with_metadata("grpc-timeout", invalid).call(LIST_TODOS, &[]).await;
        assert_invalid(rejected, &["grpc-timeout"]);
    }
    for valid in ["1H", "99999999H", "2M", "3S", "3000m", "3000000u", "99999999n"] {
        let response = raw.clone().with_metadata("grpc-timeout", valid).call(LIST_TODOS, &[]).await;
        response.unwrap_or_else(|status| panic!("{valid}: {status:?}"));
    }
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_whatever_it_waits_for() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("old").await;
    let lock = app.lock_todo(&todo.id).await;
    let raw = app.raw_client().await.with_token_of(&ana);
    let update = update_of(Todo { title: "new".into(), ..todo.clone() });
    for deadline in ["300m", "1m", "1n", "0S"] {
        let started = Instant::now();
        let response =
            raw.clone().with_metadata("grpc-timeout", deadline).call(UPDATE_TODO, &update).await;
        assert_status(response, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
        assert!(started.elapsed() < Duration::from_secs(2), "{deadline}: {:?}", started.elapsed());
    }
    lock.release().await;
    // The connections of the expired calls are usable again.
    for _ in 0..8 {
        ana.create_todo("another").await;
    }
}
