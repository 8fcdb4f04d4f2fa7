//! The clock of an owner: concurrent writes, each with a version of its own, in the order in which
//! they become visible.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use fast_zero::proto::todo::v1::Todo;
use tonic::{Code, Status};

use crate::support::{
    App, Client, PASSWORD,
    assert::assert_status,
    parallel::join_all,
    todos::{discard_message, todo_titled},
};

/// An update of all todos by another session, which moves the clock on by much.
const OTHER_UPDATE: &str = "
    update todo_clocks set version = version + 60000000;
    update todos set title = 'theirs', title_folded = 'theirs',
        version = (select version from todo_clocks);";

/// A deletion by another session.
const OTHER_DELETION: &str = "
    update todo_clocks set version = version + 60000000;
    with deleted as (delete from todos returning *)
    insert into todo_trash (
        owner_id, id, title, title_folded, description, description_folded, state, version
    )
    select owner_id, id, title, title_folded, description, description_folded, state,
        (select version from todo_clocks)
    from deleted;";

/// An undeletion by another session.
const OTHER_UNDELETION: &str = "
    update todo_clocks set version = version + 60000000;
    with restored as (delete from todo_trash returning *)
    insert into todos (
        owner_id, id, title, title_folded, description, description_folded, state, version
    )
    select owner_id, id, title, title_folded, description, description_folded, state,
        (select version from todo_clocks)
    from restored;";

fn version(etag: &str) -> i64 {
    etag.parse().expect("a version")
}

/// Makes a call that waits for a write of another session, which then commits.
async fn after<T: Send + 'static>(
    app: &App,
    write: &'static str,
    call: impl Future<Output = T> + Send + 'static,
) -> T {
    let mut lock = app.hold_lock(write).await;
    let call = tokio::spawn(call);
    lock.wait_until_blocked_by(1).await;
    lock.release().await;
    call.await.expect("no panic")
}

async fn update(ana: Client, id: String, etag: String) -> Result<Todo, Status> {
    let todo = Todo { id, etag, ..todo_titled("ours") };
    let response = ana.try_update_todo(Some(todo), Some(&["title"])).await?;
    Ok(response.into_inner().todo.expect("a todo"))
}

#[tokio::test]
async fn an_update_that_waits_for_another_compares_its_etag_with_the_newest_version() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo("old").await;
    let rejected = after(&app, OTHER_UPDATE, update(ana.clone(), old.id.clone(), old.etag)).await;
    assert_status(rejected.map(tonic::Response::new), Code::Aborted, "ETAG_MISMATCH");
    assert_eq!(ana.get_todo(&old.id).await.title, "theirs");
}

#[tokio::test]
async fn a_write_with_a_wrong_etag_moves_no_clock() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let (todo, deleted) = (ana.create_todo("a").await, ana.create_todo("b").await.id);
    ana.delete_todo(&deleted).await;
    let clock = "select version from todo_clocks";
    let before: i64 = app.fetch_scalar(clock).await;
    let updated = update(ana.clone(), todo.id.clone(), "1".into()).await;
    let results = [
        updated.map(drop),
        ana.try_delete_todo(&todo.id, "1").await.map(drop),
        ana.try_purge_todo(&todo.id, "1").await.map(drop),
        ana.try_purge_todo(&deleted, "1").await.map(drop),
    ];
    for result in results {
        assert_status(result.map(tonic::Response::new), Code::Aborted, "ETAG_MISMATCH");
    }
    assert_eq!(app.fetch_scalar::<i64>(clock).await, before);
}

#[tokio::test]
async fn an_update_that_waits_for_another_gets_the_next_version() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo("old").await;
    let ours = after(&app, OTHER_UPDATE, update(ana.clone(), old.id.clone(), String::new())).await;
    let ours = ours.expect("updated");
    assert_eq!(version(&ours.etag), version(&old.etag) + 60_000_001);
    assert_eq!(ana.get_todo(&old.id).await, ours);
    // The clock of the service is behind, and the versions increase nevertheless.
    let next = ana.create_todo("next").await;
    assert_eq!(version(&next.etag), version(&ours.etag) + 1);
}

#[tokio::test]
async fn an_update_that_waits_for_a_deletion_finds_no_todo() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for has_etag in [false, true] {
        let old = ana.create_todo("old").await;
        let etag = if has_etag { old.etag } else { String::new() };
        let rejected = after(&app, OTHER_DELETION, update(ana.clone(), old.id, etag)).await;
        assert_status(rejected.map(tonic::Response::new), Code::NotFound, "TODO_NOT_FOUND");
        app.execute("delete from todo_trash").await;
    }
}

#[tokio::test]
async fn a_deletion_that_waits_for_an_update_takes_the_newest_state() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let old = ana.create_todo("old").await;
    let (caller, id) = (ana.clone(), old.id.clone());
    let deleted = after(&app, OTHER_UPDATE, async move { caller.delete_todo(&id).await }).await;
    let todo = deleted.todo.clone().expect("a todo");
    assert_eq!((&*todo.title, version(&todo.etag)), ("theirs", version(&old.etag) + 60_000_001));
    assert_eq!(ana.list_deleted_todos(0).await, [deleted]);
}

#[tokio::test]
async fn a_deletion_that_waits_for_another_finds_no_todo() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let id = ana.create_todo("old").await.id;
    let caller = ana.clone();
    let delete = async move { caller.try_delete_todo(&id, "").await };
    let rejected = after(&app, OTHER_DELETION, delete).await;
    assert_status(rejected, Code::NotFound, "TODO_NOT_FOUND");
    assert_eq!(ana.list_deleted_todos(0).await.len(), 1);
}

#[tokio::test]
async fn a_purge_that_waits_for_a_deletion_purges_the_deleted_todo() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let id = ana.create_todo("old").await.id;
    let caller = ana.clone();
    after(&app, OTHER_DELETION, async move { caller.purge_todo(&id).await }).await;
    assert_eq!(ana.list_deleted_todos(0).await, []);
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from todos").await, 0);
    let left = "select count(*) from todo_trash where title is null";
    assert_eq!(app.fetch_scalar::<i64>(left).await, 1);
}

#[tokio::test]
async fn a_purge_that_waits_for_an_undeletion_purges_the_todo() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let id = ana.create_todo("old").await.id;
    ana.delete_todo(&id).await;
    let caller = ana.clone();
    after(&app, OTHER_UNDELETION, async move { caller.purge_todo(&id).await }).await;
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from todos").await, 0);
    let left = "select count(*) from todo_trash where title is null";
    assert_eq!(app.fetch_scalar::<i64>(left).await, 1);
}

#[tokio::test]
async fn an_undeletion_that_waits_for_another_finds_the_todo() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let id = ana.create_todo("old").await.id;
    ana.delete_todo(&id).await;
    let (caller, restored) = (ana.clone(), id.clone());
    let undelete = async move { caller.try_undelete_todo(&restored).await };
    let rejected = after(&app, OTHER_UNDELETION, undelete).await;
    assert_status(rejected, Code::AlreadyExists, "TODO_NOT_DELETED");
    assert_eq!(ana.get_todo(&id).await.title, "old");
}

#[tokio::test]
async fn a_first_todo_that_waits_for_another_gets_the_next_version() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let other = "insert into todo_clocks select id, 4000000000000000 from users";
    let caller = ana.clone();
    let created = after(&app, other, async move { caller.create_todo("first").await }).await;
    assert_eq!(version(&created.etag), 4_000_000_000_000_001);
}

/// Makes writes of every kind, concurrently, and returns the versions that they returned.
async fn write(client: Client, rounds: usize) -> Vec<i64> {
    let mut versions = Vec::new();
    for _ in 0..rounds {
        let todo = client.create_todo("a").await;
        versions.push(version(&todo.etag));
        let updated = client.update_todo(Todo { title: "b".into(), ..todo }, None).await;
        versions.push(version(&updated.etag));
        let deleted = client.delete_todo(&updated.id).await;
        versions.push(version(&deleted.todo.expect("a todo").etag));
        let restored = client.undelete_todo(&updated.id).await;
        versions.push(version(&restored.etag));
    }
    versions
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_writes_on_two_replicas_have_unique_versions() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let replica = app.start_replica().await;
    let writers = (0..32).map(|number| {
        let client = if number % 4 == 0 { &bob } else { &ana };
        let client = client.clone();
        let client = if number % 2 == 0 { client.with_channel(&replica.channel) } else { client };
        async move { (number % 4 == 0, write(client, 8).await) }
    });
    let written = join_all(writers.collect::<Vec<_>>()).await;
    for of_bob in [false, true] {
        let mine = written.iter().filter(|(owner, _)| *owner == of_bob);
        let versions: Vec<_> = mine.flat_map(|(_, versions)| versions).copied().collect();
        let distinct: BTreeSet<_> = versions.iter().copied().collect();
        assert_eq!(distinct.len(), versions.len());
        let name = if of_bob { "bob" } else { "ana" };
        let clock = sqlx::query_scalar::<_, i64>(
            "select clock.version from todo_clocks as clock join users on id = owner_id
             where username = $1",
        );
        let clock = clock.bind(name).fetch_one(&mut app.connect_database().await).await;
        assert_eq!(distinct.last().copied(), Some(clock.expect("a clock")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_shows_all_changes_up_to_its_clock() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    ana.create_todo("first").await;
    let replica = app.start_replica().await;
    let done = Arc::new(AtomicBool::new(false));
    let mut reader = app.connect_database().await;
    let read = tokio::spawn({
        let done = done.clone();
        async move {
            let mut snapshots = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let snapshot = "select clock.version, count(*), max(todos.version)
                     from todo_clocks as clock join todos using (owner_id) group by clock.version";
                let row: (i64, i64, i64) =
                    sqlx::query_as(snapshot).fetch_one(&mut reader).await.expect("a row");
                snapshots.push(row);
            }
            snapshots
        }
    });
    let writers = (0..16).map(|number| {
        let client = ana.clone();
        let client = if number % 2 == 0 { client.with_channel(&replica.channel) } else { client };
        async move {
            let mut versions = Vec::new();
            for _ in 0..16 {
                versions.push(version(&client.create_todo("a").await.etag));
            }
            versions
        }
    });
    let versions: BTreeSet<_> =
        join_all(writers.collect::<Vec<_>>()).await.concat().into_iter().collect();
    done.store(true, Ordering::Relaxed);
    let snapshots = read.await.expect("no panic");
    assert!(!snapshots.is_empty());
    for (clock, count, newest) in snapshots {
        assert_eq!(clock, newest, "only creations move the clock");
        let expected = versions.range(..=clock).count() + 1;
        assert_eq!(usize::try_from(count), Ok(expected), "all creations up to {clock}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_deletion_of_a_user_and_writes_to_its_todos_do_not_wait_for_each_other() {
    let app = App::start().await;
    for round in 0..12 {
        let name = format!("user{round}");
        let user = app.signed_up(&name).await;
        let todo = if round % 2 == 0 { Some(user.create_todo("a").await) } else { None };
        let writers = (0..6).map(|number| {
            let (user, todo) = (user.clone(), todo.clone());
            async move {
                let result = match (number % 3, todo) {
                    (0, Some(todo)) => user
                        .try_update_todo(Some(todo_titled_like(todo)), None)
                        .await
                        .map(discard_message),
                    (1, Some(todo)) => {
                        user.try_delete_todo(&todo.id, "").await.map(discard_message)
                    }
                    _ => user.try_create_todo(Some(todo_titled("b"))).await.map(discard_message),
                };
                match result.map_err(|status| status.code()) {
                    Ok(_) | Err(Code::Unauthenticated | Code::NotFound) => {}
                    Err(code) => panic!("{code:?}"),
                }
            }
        });
        let deletion = tokio::spawn({
            let user = user.clone();
            async move { user.try_delete_user("me", "").await.map(drop) }
        });
        join_all(writers.collect::<Vec<_>>()).await;
        deletion.await.expect("no panic").expect("deleted");
        let login = app.anonymous().try_log_in(&name, PASSWORD).await;
        assert_status(login, Code::Unauthenticated, "INCORRECT_CREDENTIALS");
    }
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from todo_clocks").await, 0);
}

fn todo_titled_like(todo: Todo) -> Todo {
    Todo { etag: String::new(), title: "c".into(), ..todo }
}
