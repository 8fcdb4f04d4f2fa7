//! `docs/api.md` describes what the service does.

use fast_zero::proto::todo::v1::Todo;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{
    App,
    assert::{API_DOC, assert_status},
    process::Binary,
    todos::discard_message,
};

#[tokio::test]
async fn the_table_of_methods_is_the_one_that_the_binary_prints() {
    let (code, printed) = Binary::new(&["methods"]).output().await;
    assert_eq!(code, Some(0), "{printed}");
    // The service for tests is not part of the API.
    let lines: Vec<_> = printed.lines().filter(|line| !line.contains("fastzero.test")).collect();
    assert!(lines.len() > 17, "{printed}");
    for line in lines {
        assert!(API_DOC.lines().any(|documented| documented == line), "docs/api.md lacks: {line}");
    }
}

#[tokio::test]
async fn an_etag_mismatch_has_the_current_etag_of_its_resource() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo("old").await;
    let current = ana.update_todo(Todo { title: "new".into(), ..old.clone() }, None).await;
    for rejected in [
        ana.try_update_todo(Some(old.clone()), None).await.map(discard_message),
        ana.try_delete_todo(&old.id, &old.etag).await.map(discard_message),
    ] {
        let status = assert_status(rejected, Code::Aborted, "ETAG_MISMATCH");
        let info = status.get_error_details().error_info().expect("asserted").clone();
        assert_eq!(info.metadata["current_etag"], current.etag);
        assert_eq!(info.metadata["hint"], "read the todo again and retry with its etag");
    }
}
