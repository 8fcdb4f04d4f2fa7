//! Cancelled calls.
//!
//! A handler may be dropped at any of its awaits. Its writes then happen completely or not at
//! all, and its permits, connections and locks are released.

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
        every_connection_is_usable, every_hashing_queue_slot_is_free, every_method_works,
        no_transaction_or_lock_is_open, no_write_is_partial,
    },
    state::SharedState,
};
use crate::support::{App, app::config_with, random, statements::logged_warnings};

const NEW_PASSWORD: &str = "a new password";

/// The number of concurrent callers, each with its own user.
const CALLERS: usize = 16;

/// The number of calls after which a caller opens a new connection. The HTTP/2 client closes a
/// connection after 1024 responses to cancelled calls.
const CALLS_PER_CONNECTION: usize = 500;

/// The time until a call is cancelled, as exponents of powers of two in microseconds: from
/// 32 µs, when it has not left the client, to 130 ms, when it has most likely completed. Each
/// exponent has the same probability.
const WAIT_EXPONENTS: std::ops::RangeInclusive<u32> = 6..=17;

/// The prefix of the request ids of cancelled calls.
const REQUEST_ID_PREFIX: &str = "given-up-";

/// The capacity of the hashing queue with the settings for tests: for each thread one running
/// and 16 queued hashes.
const HASHING_QUEUE_SLOTS: usize = 4 * 17;

/// The user of all logins, and the maximum number of sessions of a user.
const LOGIN_USERNAME: &str = "regular";
const MAX_SESSIONS: i64 = 100;

/// Every method of the API, with the codes of its allowed errors here.
const METHODS: [(&str, &[Code]); 26] = [
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
    ("ResetPassword", &[Code::ResourceExhausted]),
    ("IntrospectToken", &[]),
    ("ListSigningKeys", &[]),
    ("CreatePersonalAccessToken", &[Code::ResourceExhausted]),
    ("ListPersonalAccessTokens", &[]),
    ("RevokePersonalAccessToken", &[]),
    ("CreateTodo", &[]),
    ("GetTodo", &[]),
    ("ListTodos", &[]),
    ("UpdateTodo", &[]),
    // An earlier cancelled call may have deleted the todo.
    ("DeleteTodo", &[Code::NotFound]),
    // An earlier cancelled call may not have deleted the todo, or have restored it.
    ("UndeleteTodo", &[Code::NotFound, Code::AlreadyExists]),
    ("ListDeletedTodos", &[]),
    ("SyncTodos", &[]),
    ("WatchTodos", &[]),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_are_cancelled_at_any_moment_leave_nothing_behind() {
    cancel_calls(2_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn a_hundred_thousand_cancelled_calls_leave_nothing_behind() {
    cancel_calls(100_000).await;
}

async fn cancel_calls(calls: usize) {
    assert_eq!(methods(), METHODS.map(|(method, _)| method.to_owned()).into());
    let seed = random::seed();
    // Far more sign-ups than the default limit of one client.
    let settings = config_with(|config| {
        config.limits.sign_ups_per_peer_per_minute = u32::MAX;
    });
    let app = App::start_with(settings).await;
    let state = Arc::new(SharedState::new(&app, calls).await);
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        let caller = Caller::new(&app, number, seed).await;
        callers.spawn(caller.make_calls(state.clone(), calls / CALLERS));
    }
    let started = Instant::now();
    while let Some(ended) = callers.join_next().await {
        ended.expect("no caller failed an assertion");
    }
    println!("{calls} calls in {:.1?}, {CALLERS} at a time", started.elapsed());

    no_transaction_or_lock_is_open(&app).await;
    every_connection_is_usable(&app).await;
    every_hashing_queue_slot_is_free(&app).await;
    every_method_works(&app).await;
    let mut warnings = logged_warnings(REQUEST_ID_PREFIX);
    // The callers share an address, which their wrong passwords lock out.
    warnings.retain(|warning| !warning.contains("message=client locked out"));
    assert_eq!(warnings, Vec::<String>::new());
    no_write_is_partial(&app, &state).await;
    state.print_stats();
}

/// Returns the names of all methods of the API.
fn methods() -> BTreeSet<String> {
    let descriptors = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("valid descriptors");
    let services = descriptors.file.iter().flat_map(|file| &file.service);
    let methods = services.flat_map(|service| &service.method);
    methods.map(|method| method.name().to_owned()).collect()
}
