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
use crate::support::{App, Client, operator::reset_code, tokens::Jwt};

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

/// A user with two sessions, two todos, a personal access token and a reset code. A call must
/// change all or none of them.
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
    ResetPassword,
    RevokeOther,
    RevokeToken,
    Logout(LogoutScope),
}

/// The remaining rows of a target.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Remaining {
    pub(super) password_version: i64,
    pub(super) sessions: BTreeSet<Uuid>,
    pub(super) todos: i64,
    pub(super) tokens: i64,
    pub(super) reset_codes: i64,
}

impl TargetRow {
    pub(super) fn new() -> Self {
        Self { user: Uuid::now_v7(), session: Uuid::now_v7(), other: Uuid::now_v7() }
    }

    pub(super) fn client(&self, channel: &Channel) -> Client {
        let token = Jwt::for_session(&self.user.to_string(), &self.session.to_string()).signed();
        Client::new(channel.clone()).with_token(&token)
    }

    /// Returns the reset code, whose secret is the ID of the user twice.
    pub(super) fn reset_code(&self) -> String {
        reset_code(&[self.user.as_bytes().as_slice(); 3].concat())
    }

    pub(super) fn unchanged(&self) -> Remaining {
        Remaining {
            password_version: 1,
            sessions: [self.session, self.other].into(),
            todos: 2,
            tokens: 1,
            reset_codes: 1,
        }
    }

    pub(super) fn after(&self, action: Action) -> Option<Remaining> {
        let Self { session, other, .. } = *self;
        let mut after = self.unchanged();
        match action {
            Action::DeleteUser => return None,
            Action::ChangePassword => {
                after.password_version = 2;
                after.sessions = [session].into();
            }
            Action::ResetPassword => {
                after.password_version = 2;
                after.sessions.clear();
                (after.tokens, after.reset_codes) = (0, 0);
            }
            Action::RevokeOther | Action::Logout(LogoutScope::OtherSessions) => {
                after.sessions = [session].into();
            }
            Action::RevokeToken => after.tokens = 0,
            Action::Logout(LogoutScope::AllSessions) => after.sessions.clear(),
            Action::Logout(_) => after.sessions = [other].into(),
        }
        Some(after)
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
        // Six of 26 methods need a target for each call.
        let targets: Vec<_> =
            iter::repeat_with(TargetRow::new).take(calls * 6 / 26 * 5 / 4 + 200).collect();
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
         ), tokens as (
             insert into personal_access_tokens (
                 user_id, id, name, scopes, expires_at, secret_hash
             )
             select u, other, 'a', array['todo.read'], now() + interval '1 day', sha256('')
             from targets
         ), codes as (
             insert into password_reset_codes (user_id, code_hash, expires_at)
             select u, sha256(uuid_send(u) || uuid_send(u)), now() + interval '1 day' from targets
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
