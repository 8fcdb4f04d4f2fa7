//! `WatchTodos`: what it sends, and when.

use std::time::{Duration, Instant};

use fast_zero::proto::todo::v1::{Todo, WatchTodosRequest};
use tokio::time::timeout;

use crate::support::{
    App,
    changes::{Copy, described, next_message},
};

/// How long a change on the same replica may take to arrive.
const SAME_REPLICA: Duration = Duration::from_millis(50);

/// How long a change on another replica may take to arrive.
const OTHER_REPLICA: Duration = Duration::from_millis(1_200);

#[tokio::test]
async fn a_watch_with_an_empty_cursor_sends_everything_and_continues() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    for number in 0..3 {
        ana.create_todo(&number.to_string()).await;
    }
    let mut stream = ana.watch_todos(WatchTodosRequest::default()).await;
    let first = next_message(&mut stream).await;
    assert_eq!(described(&first.changes), ["0", "1", "2"]);
    assert!(first.full && first.caught_up);
    let todo = ana.create_todo("3").await;
    let second = next_message(&mut stream).await;
    assert_eq!(described(&second.changes), ["3"]);
    assert!(!second.full && second.caught_up);
    ana.delete_todo(&todo.id).await;
    assert_eq!(described(&next_message(&mut stream).await.changes), ["-3"]);
}

#[tokio::test]
async fn a_watch_from_now_sends_only_later_changes() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    // Without any todo, the owner has no clock.
    let mut first = ana.watch_from_now().await;
    ana.create_todo("a").await;
    let message = next_message(&mut first).await;
    assert_eq!(described(&message.changes), ["a"]);
    let mut second = ana.watch_from_now().await;
    ana.create_todo("b").await;
    assert_eq!(described(&next_message(&mut second).await.changes), ["b"]);
    // A cursor comes before `from_now`.
    let request = WatchTodosRequest { cursor: message.cursor, from_now: true };
    let mut third = ana.watch_todos(request).await;
    assert_eq!(described(&next_message(&mut third).await.changes), ["b"]);
}

#[tokio::test]
async fn a_message_of_a_watch_has_at_most_a_hundred_changes_and_256_kib() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    app.execute(
        "insert into todo_clocks select id, 2000 from users;
         insert into todos
         select id, gen_random_uuid(), 'a', 'a', repeat('a', 10000 * (n / 201)), '', 1, n
         from users, generate_series(1, 260) n",
    )
    .await;
    let mut stream = ana.watch_todos(WatchTodosRequest::default()).await;
    let (mut sizes, mut copy) = (Vec::new(), Copy::default());
    loop {
        let message = next_message(&mut stream).await;
        sizes.push(message.changes.len());
        let caught_up = message.caught_up;
        copy.apply(message);
        if caught_up {
            break;
        }
    }
    // Of the todos of 10,000 bytes and what is around them, 12 in 128 KiB, and 25 in 256.
    assert_eq!(sizes, [100, 100, 12, 25, 23]);
    assert_eq!(copy.todos.len(), 260);
}

#[tokio::test]
async fn a_change_on_the_same_replica_arrives_at_once() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut stream = ana.watch_from_now().await;
    // A watch that waited for the polls would take a second for each change but the first. Other
    // tests use the machine, too, so one fast change is enough.
    let mut fastest = Duration::MAX;
    for number in 0..20 {
        let started = Instant::now();
        ana.create_todo(&number.to_string()).await;
        next_message(&mut stream).await;
        if number > 0 {
            fastest = fastest.min(started.elapsed());
        }
        if fastest < SAME_REPLICA {
            return;
        }
    }
    panic!("{fastest:?}");
}

#[tokio::test]
async fn an_idle_watch_sends_a_checkpoint_every_thirty_seconds() {
    let app = App::start().await;
    let ana = app.signed_up("ana").await;
    let mut stream = ana.watch_from_now().await;
    let started = Instant::now();
    let message = timeout(Duration::from_secs(40), stream.message()).await;
    let took = started.elapsed();
    let message = message.expect("a checkpoint in time").expect("no error").expect("a message");
    assert!(message.changes.is_empty() && message.caught_up && !message.full, "{message:?}");
    assert!((26..35).contains(&took.as_secs()), "{took:?}");
    ana.create_todo("a").await;
    assert_eq!(described(&next_message(&mut stream).await.changes), ["a"]);
    let request = WatchTodosRequest { cursor: message.cursor, from_now: false };
    let mut resumed = ana.watch_todos(request).await;
    assert_eq!(described(&next_message(&mut resumed).await.changes), ["a"]);
}

#[tokio::test]
async fn a_change_on_another_replica_arrives_after_a_poll() {
    let app = App::start().await;
    let replica = app.start_replica().await;
    let ana = app.signed_up("ana").await;
    let there = ana.clone().with_channel(&replica.channel);
    let mut stream = there.watch_from_now().await;
    for number in 0..3 {
        let started = Instant::now();
        ana.create_todo(&number.to_string()).await;
        assert_eq!(described(&next_message(&mut stream).await.changes), [number.to_string()]);
        let took = started.elapsed();
        assert!(took < OTHER_REPLICA, "{took:?}");
    }
}

#[tokio::test]
async fn every_write_wakes_the_watches_of_its_owner() {
    let app = App::start().await;
    let (ana, bob) = (app.signed_up("ana").await, app.signed_up("bob").await);
    let (mut one, mut two) = (ana.watch_from_now().await, ana.watch_from_now().await);
    let mut of_bob = bob.watch_from_now().await;
    let todo = ana.create_todo("a").await;
    ana.update_todo(Todo { title: "b".into(), ..todo.clone() }, None).await;
    ana.delete_todo(&todo.id).await;
    ana.undelete_todo(&todo.id).await;
    ana.purge_todo(&todo.id).await;
    for stream in [&mut one, &mut two] {
        // States in between may be skipped, the last one never.
        while described(&next_message(stream).await.changes) != ["-"] {}
    }
    bob.create_todo("bob's").await;
    assert_eq!(described(&next_message(&mut of_bob).await.changes), ["bob's"]);
}
