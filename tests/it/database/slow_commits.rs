//! Writes of one owner while commits are slow.

use fast_zero::proto::todo::v1::Todo;

use crate::support::{App, parallel::join_all, todos::todo_titled};

/// Counts the commits that move a clock, and makes each of them take 30 ms.
const SLOW_COMMITS: &str = "
    create sequence commits;
    create function slow_commit() returns trigger language plpgsql as $$
        begin
            perform nextval('commits'), pg_sleep(0.03);
            return null;
        end
    $$;
    create constraint trigger slow_commit after insert or update on todo_clocks
        deferrable initially deferred for each row execute function slow_commit()";

#[tokio::test]
async fn writes_of_one_owner_are_batched_while_commits_are_slow() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(SLOW_COMMITS).await;
    let calls = (0..64).map(|_| {
        let ana = ana.clone();
        async move {
            let todos = [ana.create_todo("a").await, ana.create_todo("b").await];
            for Todo { id, .. } in todos {
                let updated = ana.update_todo(Todo { id, ..todo_titled("c") }, None).await;
                assert_eq!(updated.title, "c");
            }
        }
    });
    join_all(calls.collect::<Vec<_>>()).await;
    let commits: i64 = app.fetch_scalar("select last_value from commits").await;
    assert!(commits <= 256 / 8, "{commits} commits for 256 writes");
}
