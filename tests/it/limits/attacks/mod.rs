//! Attacks on the real binary with the settings that it has by default, and what they cost
//! a caller who behaves.

mod attackers;
mod connections;
mod frames;
mod headers;
mod messages;
mod readers;
mod service;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use fast_zero::proto::todo::v1::ListTodosRequest;

use self::{
    attackers::Attackers,
    connections::{excess_connections, half_open_connections, half_open_handshakes},
    frames::{empty_window_updates, pings, rapid_resets, resets_of_calls_in_flight, settings},
    headers::{
        calls_without_a_body, continuation_floods, hpack_bombs, incomplete_header_lists,
        large_header_lists, many_small_headers, oversized_header_lists,
    },
    messages::{incomplete_requests, oversized_messages, slow_senders, truncated_messages},
    readers::{slow_readers, unread_errors, unread_reflection, unread_responses},
    service::Service,
};
use crate::support::{
    http2::{self, RawHttp2},
    priority,
    raw_client::RawClient,
};

/// How much more memory the server may take than before, in KiB.
const MAX_GROWTH: u64 = 32 * 1024;

/// How often the caller who behaves calls.
const CALL_EVERY: Duration = Duration::from_millis(5);

/// How much longer than without an attack the slowest calls may take.
const MAX_SLOWDOWN: f64 = 2.0;

/// The pause between the steps of an attack that goes on and on.
const STEP: Duration = Duration::from_millis(10);

/// A way to hurt the service.
#[derive(Clone, Copy)]
struct Attack {
    name: &'static str,
    /// How many do the same at once.
    workers: u32,
    /// From how many addresses.
    peers: u32,
    has_tls: bool,
    /// What each does, again and again.
    work: fn(Target) -> Work,
}

type Work = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// What is attacked, and by whom.
#[derive(Clone)]
struct Target {
    address: SocketAddr,
    /// An access token of a user whose list has a MiB.
    token: Arc<str>,
    /// The number of the attacker, and where it is.
    worker: u32,
    peer: Ipv4Addr,
    /// How often something was done.
    done: Arc<AtomicU64>,
}

macro_rules! attacks {
    ($($name:ident: $workers:literal $(from $peers:literal)? $(over $tls:ident)?),+ $(,)?) => {
        const ATTACKS: &[Attack] = &[$(Attack {
            name: stringify!($name),
            workers: $workers,
            peers: 1 $(- 1 + $peers)?,
            has_tls: false $(|| { let $tls = true; $tls })?,
            work: |target| Box::pin($name(target)),
        }),+];

        /// Each, for a moment.
        mod briefly {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "takes the whole machine: one at a time"]
            async fn $name() {
                super::survive(stringify!($name), super::Size::BRIEF).await.expect("nobody notices");
            })+
        }
    };
}

attacks! {
    rapid_resets: 4,
    resets_of_calls_in_flight: 4,
    half_open_connections: 1000 from 4,
    half_open_handshakes: 250 over tls,
    incomplete_header_lists: 250,
    excess_connections: 1000,
    continuation_floods: 8,
    large_header_lists: 40,
    many_small_headers: 40,
    oversized_header_lists: 4,
    hpack_bombs: 8,
    oversized_messages: 8,
    truncated_messages: 4,
    incomplete_requests: 8,
    slow_readers: 8,
    unread_responses: 8,
    unread_errors: 32,
    unread_reflection: 8,
    slow_senders: 8,
    pings: 2,
    settings: 2,
    empty_window_updates: 4,
    calls_without_a_body: 40,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn other_clients_are_unaffected() {
    let only = std::env::var("TEST_ATTACK").ok();
    let mut failures = Vec::new();
    for attack in ATTACKS {
        if only.as_ref().is_none_or(|only| attack.name.contains(&**only)) {
            failures.extend(survive(attack.name, Size::FULL).await.err());
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// How long it takes.
#[derive(Clone, Copy)]
struct Size {
    rounds: usize,
    round: Duration,
    /// Whether times are looked at.
    is_timed: bool,
}

impl Size {
    const BRIEF: Self = Self { rounds: 1, round: Duration::from_secs(1), is_timed: false };
    const FULL: Self =
        Self { rounds: 5, round: Duration::from_secs(2), is_timed: !cfg!(debug_assertions) };
}

async fn survive(name: &'static str, size: Size) -> Result<(), String> {
    let attack = *ATTACKS.iter().find(|attack| attack.name == name).expect("it is in the list");
    let service = Service::start(attack.has_tls).await;
    let before = service.server.memory_kib("VmRSS");
    service.forget_peak();
    let (mut quiet, mut attacked) = (Duration::MAX, Duration::MAX);
    let mut done = 0;
    for _ in 0..size.rounds {
        quiet = quiet.min(service.p99(size.round).await);
        let attackers = Attackers::begin(attack, &service);
        attacked = attacked.min(service.p99(size.round).await);
        done += attackers.end();
    }
    let growth = service.server.memory_kib("VmHWM").saturating_sub(before);
    let slowdown = attacked.as_secs_f64() / quiet.as_secs_f64();
    let figures = format!(
        "{name}: p99 {quiet:.2?}, attacked {attacked:.2?}, {slowdown:.1} times; memory {} MiB + \
         {} MiB; done {done} times",
        before / 1024,
        growth.div_ceil(1024),
    );
    println!("{figures}");
    let least = if size.is_timed { attack.workers } else { 1 };
    assert!(done >= u64::from(least), "{done} times is no attack");
    service.recovers().await;
    let is_fast = !size.is_timed || slowdown <= MAX_SLOWDOWN;
    if is_fast && growth <= MAX_GROWTH { Ok(()) } else { Err(figures) }
}

impl Target {
    fn done(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
        priority::yield_cpu();
    }

    async fn sender(&self) -> io::Result<RawHttp2> {
        RawHttp2::connect(self.address, self.peer).await
    }

    async fn raw_client(&self, window: impl Into<Option<u32>>) -> io::Result<RawClient> {
        let wire = RawClient::connect_from(self.peer, self.address, window).await?;
        Ok(wire.with_metadata("authorization", format!("Bearer {}", self.token)))
    }

    fn call(&self, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
        let bearer = format!("Bearer {}", self.token);
        let mut headers = vec![("authorization", &*bearer)];
        headers.extend(more);
        http2::header_block(path, &headers)
    }
}

const GET: &str = "/fastzero.todo.v1.TodoService/GetTodo";
const LIST: &str = "/fastzero.todo.v1.TodoService/ListTodos";
const CREATE: &str = "/fastzero.todo.v1.TodoService/CreateTodo";
const STREAMS: usize = 128;

/// The largest page of those for which several callers share a statement.
fn all() -> ListTodosRequest {
    ListTodosRequest { page_size: 100, ..ListTodosRequest::default() }
}
