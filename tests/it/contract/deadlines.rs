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
    let wire = app.raw_client().await.with_token_of(&ana);
    for bad in ["", "1", "S", "1s", "-1S", "+1S", "1.5S", "1 S", "123456789S", "soon"] {
        let refused = wire.clone().with_metadata("grpc-timeout", bad).call(LIST_TODOS, &[]).await;
        assert_invalid(refused, &["grpc-timeout"]);
    }
    for good in ["1H", "99999999H", "2M", "3S", "3000m", "3000000u", "99999999n"] {
        let answer = wire.clone().with_metadata("grpc-timeout", good).call(LIST_TODOS, &[]).await;
        answer.unwrap_or_else(|status| panic!("{good}: {status:?}"));
    }
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_whatever_it_waits_for() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let todo = ana.create_todo("old").await;
    let held = app.lock_todo(&todo.id).await;
    let wire = app.raw_client().await.with_token_of(&ana);
    let update = update_of(Todo { title: "new".into(), ..todo.clone() });
    for deadline in ["300m", "1m", "1n", "0S"] {
        let begun = Instant::now();
        let answer =
            wire.clone().with_metadata("grpc-timeout", deadline).call(UPDATE_TODO, &update).await;
        assert_status(answer, Code::DeadlineExceeded, "DEADLINE_EXCEEDED");
        assert!(begun.elapsed() < Duration::from_secs(2), "{deadline}: {:?}", begun.elapsed());
    }
    held.release().await;
    // The connections that the calls left behind serve others again.
    for _ in 0..8 {
        ana.create_todo("another").await;
    }
}
