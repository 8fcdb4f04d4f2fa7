//! Calls whose caller goes away.
//!
//! A handler may be dropped at any of its awaits. What it was doing in the database then
//! either happens as a whole or not at all, and whatever it held is free again.

mod caller;
mod checks;
mod state;

use std::{collections::BTreeSet, sync::Arc, time::Instant};

use fast_zero::proto::FILE_DESCRIPTOR_SET;
use prost::Message;
use prost_types::FileDescriptorSet;
use tokio::task::JoinSet;
use tonic::Code;

use self::{
    caller::Caller,
    checks::{
        every_connection_can_be_used, every_method_works, every_place_in_the_hashing_queue_is_free,
        no_write_is_half_done, nothing_is_open,
    },
    state::Stage,
};
use crate::support::{App, app::config_with, random, statements::logged_warnings};

const NEW: &str = "a new password";

/// Calls that are under way at the same time, each of another user.
const CALLERS: usize = 16;

/// After so many calls a caller opens a new connection. The client's HTTP/2 ends one on
/// which it was sent 1024 answers that it did not wait for.
const CALLS_PER_CONNECTION: usize = 500;

/// How long a call is waited for, in powers of two of a microsecond: from 32 µs, when it
/// has not left the client, to 130 ms, when it is most likely answered. Each doubling is
/// as likely as any other.
const PATIENCE: std::ops::RangeInclusive<u32> = 6..=17;

/// What all request ids of the calls that are given up begin with.
const REQUESTS: &str = "given-up-";

/// What the hashing queue of the tests' settings holds: one hash for each thread, and 16
/// that wait for each.
const HASHING_PLACES: usize = 4 * 17;

/// The user whom all logins are of, and how many sessions one may have.
const REGULAR: &str = "regular";
const MAX_SESSIONS: i64 = 100;

/// Every method of the contract, and what a call of it may be refused with here.
const METHODS: [(&str, &[Code]); 17] = [
    ("CreateUser", &[Code::ResourceExhausted]),
    ("GetUser", &[]),
    ("ListUsers", &[]),
    ("UpdateUser", &[]),
    ("DeleteUser", &[]),
    ("Login", &[Code::ResourceExhausted]),
    ("RefreshToken", &[]),
    ("Logout", &[]),
    ("ListSessions", &[]),
    ("RevokeSession", &[]),
    ("ChangePassword", &[Code::ResourceExhausted]),
    ("IntrospectToken", &[]),
    ("CreateTodo", &[]),
    ("GetTodo", &[]),
    ("ListTodos", &[]),
    ("UpdateTodo", &[]),
    // By an earlier call that nobody waited for.
    ("DeleteTodo", &[Code::NotFound]),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_are_cancelled_at_any_moment_leave_nothing_behind() {
    give_up(2_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn a_hundred_thousand_cancelled_calls_leave_nothing_behind() {
    give_up(100_000).await;
}

async fn give_up(calls: usize) {
    assert_eq!(methods(), METHODS.map(|(method, _)| method.to_owned()).into());
    let seed = random::seed();
    // Far more sign-ups than one peer makes otherwise.
    let settings = config_with(|config| {
        config.limits.sign_ups_per_peer_per_minute = u32::MAX;
    });
    let app = App::start_with(settings).await;
    let stage = Arc::new(Stage::set(&app, calls).await);
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        let caller = Caller::new(&app, number, seed).await;
        callers.spawn(caller.make_calls(stage.clone(), calls / CALLERS));
    }
    let begun = Instant::now();
    while let Some(ended) = callers.join_next().await {
        ended.expect("no caller saw what it should not");
    }
    println!("{calls} calls in {:.1?}, {CALLERS} at a time", begun.elapsed());

    nothing_is_open(&app).await;
    every_connection_can_be_used(&app).await;
    every_place_in_the_hashing_queue_is_free(&app).await;
    every_method_works(&app).await;
    assert_eq!(logged_warnings(REQUESTS), Vec::<String>::new());
    no_write_is_half_done(&app, &stage).await;
    stage.print_figures();
}

/// The names of all methods of the contract.
fn methods() -> BTreeSet<String> {
    let descriptors = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("good descriptors");
    let services = descriptors.file.iter().flat_map(|file| &file.service);
    let methods = services.flat_map(|service| &service.method);
    methods.map(|method| method.name().to_owned()).collect()
}
