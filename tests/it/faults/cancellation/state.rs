//! What all callers use, and the rows that their calls delete or change.

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

use super::{METHODS, REGULAR};
use crate::support::{App, Client, tokens::Jwt};

/// What all callers share.
pub(super) struct Stage {
    pub(super) address: SocketAddr,
    pub(super) victims: Mutex<Vec<Victim>>,
    /// Those that a call was made against, and whether it was answered.
    pub(super) used: Mutex<Vec<(Victim, Deed, bool)>>,
    /// For each method.
    pub(super) figures: [Figures; METHODS.len()],
}

#[derive(Default)]
pub(super) struct Figures {
    pub(super) answered: AtomicUsize,
    pub(super) refused: AtomicUsize,
    pub(super) given_up: AtomicUsize,
}

/// A user with a session, another session and two to-dos, of whom nothing may be left, or
/// everything.
#[derive(Clone, Copy)]
pub(super) struct Victim {
    pub(super) user: Uuid,
    pub(super) session: Uuid,
    pub(super) other: Uuid,
}

/// A call that ends more than one row, or a session.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Deed {
    DeleteUser,
    ChangePassword,
    RevokeOther,
    Logout(LogoutScope),
}

/// What is left of a victim: the version of the password, the sessions, how many to-dos.
pub(super) type Left = (i64, BTreeSet<Uuid>, i64);

impl Victim {
    pub(super) fn new() -> Self {
        Self { user: Uuid::now_v7(), session: Uuid::now_v7(), other: Uuid::now_v7() }
    }

    pub(super) fn client(&self, channel: &Channel) -> Client {
        let token = Jwt::for_session(&self.user.to_string(), &self.session.to_string()).signed();
        Client::new(channel.clone()).with_token(&token)
    }

    pub(super) fn untouched(&self) -> Left {
        (1, [self.session, self.other].into(), 2)
    }

    pub(super) fn after(&self, deed: Deed) -> Option<Left> {
        let Self { session, other, .. } = *self;
        match deed {
            Deed::DeleteUser => None,
            Deed::ChangePassword => Some((2, [session].into(), 2)),
            Deed::RevokeOther | Deed::Logout(LogoutScope::OtherSessions) => {
                Some((1, [session].into(), 2))
            }
            Deed::Logout(LogoutScope::AllSessions) => Some((1, BTreeSet::new(), 2)),
            Deed::Logout(_) => Some((1, [other].into(), 2)),
        }
    }
}

impl Stage {
    pub(super) async fn set(app: &App, calls: usize) -> Self {
        app.create_user(REGULAR).await;
        // As many as one may have, so that every login has to end one.
        app.execute(
            "insert into sessions (
                 user_id, id, generation, rotated_at, expires_at, user_agent, peer
             )
             select users.id, ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid,
                 0, now(), now() + interval '1 day', '', ''
             from users, generate_series(1, 100) as n",
        )
        .await;
        // Four methods of seventeen need one for each call.
        let victims: Vec<_> =
            iter::repeat_with(Victim::new).take(calls * 4 / 17 * 5 / 4 + 200).collect();
        insert(app, &victims).await;
        let (victims, used) = (Mutex::new(victims), Mutex::default());
        Self { address: app.address, victims, used, figures: <_>::default() }
    }

    pub(super) fn victim(&self) -> Victim {
        let victim = self.victims.lock().expect("no panic").pop();
        victim.expect("there are more than are needed")
    }

    pub(super) fn print_figures(&self) {
        let sum = |of: fn(&Figures) -> &AtomicUsize| -> usize {
            self.figures.iter().map(|figures| of(figures).load(Ordering::Relaxed)).sum()
        };
        for ((method, _), figures) in METHODS.iter().zip(&self.figures) {
            let Figures { answered, refused, given_up } = figures;
            println!("{method}: {answered:?} answered, {refused:?} refused, {given_up:?} given up");
        }
        let answered = sum(|figures| &figures.answered);
        let given_up = sum(|figures| &figures.given_up);
        println!("all: {answered} answered, {given_up} given up");
        assert!(answered > 0 && given_up > 0, "there were both");
    }
}

/// Adds victims, whose password is that of the regular user.
pub(super) async fn insert(app: &App, victims: &[Victim]) {
    let of = |id: fn(&Victim) -> Uuid| victims.iter().map(id).collect::<Vec<_>>();
    let inserted = sqlx::query(
        "with victims as (
             select * from unnest($1::uuid[], $2::uuid[], $3::uuid[]) as v (u, session, other)
         ), added as (
             insert into users (
                 id, username, username_folded, email, email_folded, password_hash,
                 password_version, updated_at, version
             )
             select u, u, u, u || '@example.com', u || '@example.com', password_hash, 1, now(), 1
             from victims, users where username = 'regular'
         ), opened as (
             insert into sessions (
                 user_id, id, generation, rotated_at, expires_at, user_agent, peer
             )
             select u, unnest(array[session, other]), 0, now(), now() + interval '1 day', '', ''
             from victims
         )
         insert into todos (
             owner_id, id, title, title_folded, description, description_folded, state,
             updated_at, version
         )
         select u, unnest(array[session, other]), 'a', 'a', '', '', 1, now(), 1 from victims",
    )
    .bind(of(|victim| victim.user))
    .bind(of(|victim| victim.session))
    .bind(of(|victim| victim.other))
    .execute(&mut app.connect_database().await)
    .await;
    inserted.expect("the statement works");
}
