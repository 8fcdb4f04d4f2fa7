//! The state that all callers share, and the rows that their calls delete or change.

use std::{
    collections::BTreeSet,
    iter,
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use fast_zero::proto::auth::v1::LogoutScope;
use tonic::transport::Channel;
use uuid::Uuid;

use super::{LOGIN_USERNAME, METHODS};
use crate::support::{App, Client, tokens::Jwt};

/// The state that all callers share.
pub(super) struct SharedState {
    pub(super) address: SocketAddr,
    pub(super) targets: Mutex<Vec<TargetRow>>,
    /// The targets of calls, and whether the call succeeded.
    pub(super) called: Mutex<Vec<(TargetRow, Action, bool)>>,
    /// Statistics by method.
    pub(super) counts: [MethodStats; METHODS.len()],
}

#[derive(Default)]
pub(super) struct MethodStats {
    pub(super) succeeded: AtomicUsize,
    pub(super) rejected: AtomicUsize,
    pub(super) cancelled: AtomicUsize,
}

/// A user with two sessions and two todos. A call must change all or none of them.
#[derive(Clone, Copy)]
pub(super) struct TargetRow {
    pub(super) user: Uuid,
    pub(super) session: Uuid,
    pub(super) other: Uuid,
}

/// A call that writes several rows or deletes a session.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Action {
    DeleteUser,
    ChangePassword,
    RevokeOther,
    Logout(LogoutScope),
}

/// The remaining rows of a target: password version, sessions, number of todos.
pub(super) type Remaining = (i64, BTreeSet<Uuid>, i64);

impl TargetRow {
    pub(super) fn new() -> Self {
        Self { user: Uuid::now_v7(), session: Uuid::now_v7(), other: Uuid::now_v7() }
    }

    pub(super) fn client(&self, channel: &Channel) -> Client {
        let token = Jwt::for_session(&self.user.to_string(), &self.session.to_string()).signed();
        Client::new(channel.clone()).with_token(&token)
    }

    pub(super) fn unchanged(&self) -> Remaining {
        (1, [self.session, self.other].into(), 2)
    }

    pub(super) fn after(&self, action: Action) -> Option<Remaining> {
        let Self { session, other, .. } = *self;
        match action {
            Action::DeleteUser => None,
            Action::ChangePassword => Some((2, [session].into(), 2)),
            Action::RevokeOther | Action::Logout(LogoutScope::OtherSessions) => {
                Some((1, [session].into(), 2))
            }
            Action::Logout(LogoutScope::AllSessions) => Some((1, BTreeSet::new(), 2)),
            Action::Logout(_) => Some((1, [other].into(), 2)),
        }
    }
}

impl SharedState {
    pub(super) async fn new(app: &App, calls: usize) -> Self {
        app.create_user(LOGIN_USERNAME).await;
        // The maximum number of sessions, so that every login has to delete one.
        app.execute(
            "insert into sessions (
                 user_id, id, generation, rotated_at, expires_at, user_agent, peer
             )
             select users.id, ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid,
                 0, now(), now() + interval '1 day', '', ''
             from users, generate_series(1, 100) as n",
        )
        .await;
        // Four of 17 methods need a target for each call.
        let targets: Vec<_> =
            iter::repeat_with(TargetRow::new).take(calls * 4 / 17 * 5 / 4 + 200).collect();
        insert(app, &targets).await;
        let (targets, called) = (Mutex::new(targets), Mutex::default());
        Self { address: app.address, targets, called, counts: <_>::default() }
    }

    pub(super) fn target(&self) -> TargetRow {
        let target = self.targets.lock().expect("no panic").pop();
        target.expect("more targets than calls")
    }

    pub(super) fn print_stats(&self) {
        let sum = |counter: fn(&MethodStats) -> &AtomicUsize| -> usize {
            self.counts.iter().map(|counts| counter(counts).load(Ordering::Relaxed)).sum()
        };
        for ((method, _), counts) in METHODS.iter().zip(&self.counts) {
            let MethodStats { succeeded, rejected, cancelled } = counts;
            println!(
                "{method}: {succeeded:?} succeeded, {rejected:?} failed, {cancelled:?} cancelled"
            );
        }
        let succeeded = sum(|counts| &counts.succeeded);
        let cancelled = sum(|counts| &counts.cancelled);
        println!("all: {succeeded} succeeded, {cancelled} cancelled");
        assert!(succeeded > 0 && cancelled > 0, "no call succeeded, or none was cancelled");
    }
}

/// Inserts targets with the password of the login user.
pub(super) async fn insert(app: &App, targets: &[TargetRow]) {
    let column = |id: fn(&TargetRow) -> Uuid| targets.iter().map(id).collect::<Vec<_>>();
    let inserted = sqlx::query(
        "with targets as (
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[]) as v (u, session, other)
         ), added as (
             insert into users (
                 id, username, username_folded, email, email_folded, password_hash,
                 password_version, updated_at, version
             )
             select u, u, u, u || '@example.com', u || '@example.com', password_hash, 1, now(), 1
             from targets, users where username = 'regular'
         ), opened as (
             insert into sessions (
                 user_id, id, generation, rotated_at, expires_at, user_agent, peer
             )
             select u, unnest(array[session, other]), 0, now(), now() + interval '1 day', '', ''
             from targets
         ), clocks as (
             insert into todo_clocks select u, 2 from targets
         )
         insert into todos (
             owner_id, id, title, title_folded, description, description_folded, state, version
         )
         select u, unnest(array[session, other]), 'a', 'a', '', '', 1, unnest(array[1, 2])
         from targets",
    )
    .bind(column(|target| target.user))
    .bind(column(|target| target.session))
    .bind(column(|target| target.other))
    .execute(&mut app.connect_database().await)
    .await;
    inserted.expect("inserted");
}
