//! What must hold after all calls have ended.

use std::collections::HashMap;

use fast_zero::proto::{auth::v1::LogoutScope, todo::v1::Todo};
use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;

use super::{
    CALLERS, HASHING_PLACES, MAX_SESSIONS, NEW,
    state::{Left, Stage, Victim},
};
use crate::support::{
    App, PASSWORD,
    app::config,
    assert::assert_status,
    parallel::join_all,
    users::own_user,
    wait::{wait_until, with_timeout},
};

pub(super) async fn nothing_is_open(app: &App) {
    let busy = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'fast-zero' and (
            state is distinct from 'idle'
            or exists (select from pg_locks where pg_locks.pid = pg_stat_activity.pid)
        )";
    wait_until("no connection is busy or holds a lock", async || {
        app.fetch_scalar::<i64>(busy).await == 0
    })
    .await;
    let open = "select count(*) from pg_stat_activity
        where datname = current_database() and application_name = 'fast-zero'";
    let most = i64::from(config().limits.database_max_connections) + 1;
    let open = app.fetch_scalar::<i64>(open).await;
    assert!((1..=most).contains(&open), "{open} connections, of which health has one");
}

/// Calls of which each needs a connection at the same time: none has leaked, and none is
/// left in a transaction that would hide from others what it writes.
pub(super) async fn every_connection_can_be_used(app: &App) {
    let connections = config().limits.database_max_connections;
    let ana = app.signed_up("ana").await;
    let mut lock = app.hold_lock("select from users where username = 'ana' for update").await;
    let calls = (0..connections).map(|_| {
        let ana = ana.clone();
        async move { ana.update_user(own_user("ana", ""), None).await }
    });
    let calls = tokio::spawn(join_all(calls.collect::<Vec<_>>()));
    lock.wait_until_blocked_by(connections.into()).await;
    lock.release().await;
    calls.await.expect("updated");
    let version = "select version from users where username = 'ana'";
    assert_eq!(app.fetch_scalar::<i64>(version).await, 1 + i64::from(connections));
}

pub(super) async fn every_place_in_the_hashing_queue_is_free(app: &App) {
    // Hashes that nobody waits for may still be made.
    wait_until("as many logins as there are places are admitted, and no more", async || {
        // They take their places, and come no further than the first statement.
        let lock = app.hold_lock("lock table users in access exclusive mode").await;
        let calls = (0..=HASHING_PLACES).map(|number| {
            // Of one account, most would wait before they take a place.
            let (anonymous, login) = (app.anonymous(), format!("caller{}", number % CALLERS));
            async move { anonymous.try_log_in(&login, PASSWORD).await }
        });
        let mut logins: JoinSet<_> = calls.collect();
        let first = logins.join_next().await.expect("there are some").expect("no panic");
        assert!(first.is_err(), "none can be answered");
        lock.release().await;
        let rest = logins.join_all().await;
        if rest.iter().all(Result::is_ok) {
            assert_status(first, Code::ResourceExhausted, "OVERLOADED");
            return true;
        }
        false
    })
    .await;
}

/// A round of calls that are waited for, more at once than there are connections.
pub(super) async fn every_method_works(app: &App) {
    let users = (0..4 * config().limits.database_max_connections).map(|n| {
        let (anonymous, name) = (app.anonymous(), format!("late{n}"));
        async move {
            anonymous.sign_up(&name, &format!("{name}@example.com"), PASSWORD).await;
            let user = anonymous.logged_in(&name, PASSWORD).await.expect("logged in");
            let other = anonymous.logged_in(&name, PASSWORD).await.expect("logged in");
            user.get_user("me").await;
            assert_eq!(user.list_users(<_>::default()).await.users.len(), 100);
            user.update_user(own_user(&name, ""), None).await;
            user.refresh(&user.tokens().refresh_token).await;
            assert_eq!(user.list_sessions().await.len(), 2);
            user.try_revoke_session(&other.tokens().session_id).await.expect("revoked");
            assert!(!other.is_session_active().await);
            user.change_password(PASSWORD, NEW).await;
            assert!(user.introspect(&user.tokens().access_token).await.active);
            let todo = user.create_todo("a").await;
            user.update_todo(Todo { title: "b".into(), ..todo.clone() }, None).await;
            assert_eq!(user.get_todo(&todo.id).await.title, "b");
            assert_eq!(user.list_all_todos(<_>::default()).await.len(), 1);
            user.try_delete_todo(&todo.id, "").await.expect("deleted");
            user.log_out(LogoutScope::AllSessions).await;
            let user = anonymous.logged_in(&name, NEW).await.expect("logged in");
            user.try_delete_user("me", "").await.expect("deleted");
        }
    });
    with_timeout("a round of calls", join_all(users.collect::<Vec<_>>())).await;
}

pub(super) async fn no_write_is_half_done(app: &App, stage: &Stage) {
    let left = what_is_left(app).await;
    let left = |victim: &Victim| left.get(&victim.user).cloned();
    let used = stage.used.lock().expect("no panic").clone();
    let unused = stage.victims.lock().expect("no panic").clone();
    let (mut done, mut undone) = (0, 0);
    for (victim, deed, answered) in &used {
        let left = left(victim);
        if left == victim.after(*deed) {
            done += usize::from(!answered);
        } else {
            assert!(!answered, "{deed:?} was answered, but left {left:?}");
            assert_eq!(left, Some(victim.untouched()), "{deed:?} was done by half");
            undone += 1;
        }
    }
    println!("of the calls that end something and were given up, {done} did and {undone} did not");
    for victim in &unused {
        assert_eq!(left(victim), Some(victim.untouched()), "nobody touched it");
    }
    // A login that opens a session also ends the oldest of too many.
    let sessions = "select count(*) from sessions join users on users.id = user_id
        where username = 'regular'";
    assert_eq!(app.fetch_scalar::<i64>(sessions).await, MAX_SESSIONS);
    // Both are always set to the same.
    let torn = "select count(*) from todos join users on users.id = owner_id
        where username like 'caller%' and title <> description
            and (title, description) not in (('0', ''), ('to be deleted', ''))";
    assert_eq!(app.fetch_scalar::<i64>(torn).await, 0);
}

pub(super) async fn what_is_left(app: &App) -> HashMap<Uuid, Left> {
    let rows: Vec<(Uuid, i64, Vec<Uuid>, i64)> = sqlx::query_as(
        "select id, password_version,
             array(select sessions.id from sessions where user_id = users.id),
             (select count(*) from todos where owner_id = users.id)
         from users",
    )
    .fetch_all(&mut app.connect_database().await)
    .await
    .expect("listed");
    let left = |(id, version, sessions, todos): (_, _, Vec<_>, _)| {
        (id, (version, sessions.into_iter().collect(), todos))
    };
    rows.into_iter().map(left).collect()
}
