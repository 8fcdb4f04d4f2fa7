//! The assertions after all calls have ended.

use std::collections::HashMap;

use fast_zero::proto::{
    auth::v1::{CreatePersonalAccessTokenRequest, ListSigningKeysRequest, LogoutScope},
    todo::v1::Todo,
};
use tokio::task::JoinSet;
use tonic::Code;
use uuid::Uuid;

use super::{
    CALLERS, HASHING_QUEUE_SLOTS, MAX_SESSIONS, NEW_PASSWORD,
    state::{Remaining, SharedState, TargetRow},
};
use crate::support::{
    App, PASSWORD,
    app::config,
    assert::assert_status,
    parallel::join_all,
    personal_access_tokens::new_token,
    users::own_user,
    wait::{wait_until, with_timeout},
};

pub(super) async fn no_transaction_or_lock_is_open(app: &App) {
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
    assert!((1..=most).contains(&open), "{open} connections, including one for health checks");
}

/// Makes as many concurrent calls as there are connections. None of the connections leaked or
/// remained in a transaction that would hide its writes.
pub(super) async fn every_connection_is_usable(app: &App) {
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

pub(super) async fn every_hashing_queue_slot_is_free(app: &App) {
    // Hashes of cancelled calls may still be running.
    wait_until("exactly as many logins as slots are admitted", async || {
        // The lock stops the logins at their first statement, where they occupy a slot.
        let lock = app.hold_lock("lock table users in access exclusive mode").await;
        let calls = (0..=HASHING_QUEUE_SLOTS).map(|number| {
            // Logins of one account would wait for the throttle before the queue.
            let (anonymous, login) = (app.anonymous(), format!("caller{}", number % CALLERS));
            async move { anonymous.try_log_in(&login, PASSWORD).await }
        });
        let mut logins: JoinSet<_> = calls.collect();
        let first = logins.join_next().await.expect("a login").expect("no panic");
        assert!(first.is_err(), "no login can succeed before the release of the lock");
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

/// Calls every method, with more concurrent callers than connections.
pub(super) async fn every_method_works(app: &App) {
    let users = (0..4 * config().limits.database_max_connections).map(|n| {
        let (anonymous, name) = (app.anonymous(), format!("final{n}"));
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
            user.change_password(PASSWORD, NEW_PASSWORD).await;
            let request = CreatePersonalAccessTokenRequest {
                current_password: NEW_PASSWORD.to_owned(),
                ..new_token(&["todo.read"])
            };
            let created = user.try_create_token(request).await.expect("created").into_inner();
            assert_eq!(user.list_tokens().await, created.personal_access_token.as_slice());
            let token = user.clone().with_token(&created.secret);
            assert_eq!(token.list_all_todos(<_>::default()).await, []);
            let id = created.personal_access_token.expect("a token").id;
            user.try_revoke_token(&id).await.expect("revoked");
            let keys = user.auth().list_signing_keys(ListSigningKeysRequest {}).await;
            assert_eq!(keys.expect("listed").into_inner().keys.len(), 3);
            assert!(user.introspect(&user.tokens().access_token).await.active);
            let todo = user.create_todo("a").await;
            user.update_todo(Todo { title: "b".into(), ..todo.clone() }, None).await;
            assert_eq!(user.get_todo(&todo.id).await.title, "b");
            assert_eq!(user.list_all_todos(<_>::default()).await.len(), 1);
            user.try_delete_todo(&todo.id, "").await.expect("deleted");
            assert_eq!(user.list_deleted_todos(0).await.len(), 1);
            user.undelete_todo(&todo.id).await;
            user.purge_todo(&todo.id).await;
            user.log_out(LogoutScope::AllSessions).await;
            let user = anonymous.logged_in(&name, NEW_PASSWORD).await.expect("logged in");
            user.try_delete_user("me", "").await.expect("deleted");
        }
    });
    with_timeout("a round of calls", join_all(users.collect::<Vec<_>>())).await;
}

pub(super) async fn no_write_is_partial(app: &App, state: &SharedState) {
    let remaining = remaining_rows(app).await;
    let remaining = |target: &TargetRow| remaining.get(&target.user).cloned();
    let called = state.called.lock().expect("no panic").clone();
    let unused = state.targets.lock().expect("no panic").clone();
    let (mut done, mut undone) = (0, 0);
    for (target, action, succeeded) in &called {
        let remaining = remaining(target);
        if remaining == target.after(*action) {
            done += usize::from(!succeeded);
        } else {
            assert!(!succeeded, "{action:?} succeeded, but left {remaining:?}");
            assert_eq!(remaining, Some(target.unchanged()), "{action:?} wrote a part");
            undone += 1;
        }
    }
    println!("cancelled calls with a target: {done} wrote, {undone} did not");
    for target in &unused {
        assert_eq!(remaining(target), Some(target.unchanged()), "no call had this target");
    }
    // A login that opens a session also deletes the oldest one beyond the limit.
    let sessions = "select count(*) from sessions join users on users.id = user_id
        where username = 'regular'";
    assert_eq!(app.fetch_scalar::<i64>(sessions).await, MAX_SESSIONS);
    // Every update sets title and description to the same text.
    let torn = "select count(*) from todos join users on users.id = owner_id
        where username like 'caller%' and title <> description
            and (title, description) not in (('0', ''), ('to be deleted', ''))";
    assert_eq!(app.fetch_scalar::<i64>(torn).await, 0);
}

pub(super) async fn remaining_rows(app: &App) -> HashMap<Uuid, Remaining> {
    let rows: Vec<(Uuid, i64, Vec<Uuid>, i64, i64, i64)> = sqlx::query_as(
        "select id, password_version,
             array(select sessions.id from sessions where user_id = users.id),
             (select count(*) from todos where owner_id = users.id),
             (select count(*) from personal_access_tokens where user_id = users.id),
             (select count(*) from password_reset_codes where user_id = users.id)
         from users",
    )
    .fetch_all(&mut app.connect_database().await)
    .await
    .expect("listed");
    let remaining =
        rows.into_iter().map(|(id, password_version, sessions, todos, tokens, reset_codes)| {
            let sessions = sessions.into_iter().collect();
            (id, Remaining { password_version, sessions, todos, tokens, reset_codes })
        });
    remaining.collect()
}
