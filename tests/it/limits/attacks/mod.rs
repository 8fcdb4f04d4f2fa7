//! Attacks on the real binary with its default settings, and how they affect a well-behaved
//! client.

mod attackers;
mod connections;
mod frames;
mod headers;
mod messages;
mod readers;
mod service;
mod watches;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc, LazyLock,
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
    messages::{
        BOMBS, decompression_bombs, incomplete_requests, oversized_messages, slow_senders,
        truncated_messages,
    },
    readers::{slow_readers, unread_errors, unread_reflection, unread_responses},
    service::Service,
    watches::{slow_watches, unread_watches, watch_resets},
};
use crate::support::{
    http2::{self, RawHttp2},
    priority,
    raw_client::RawClient,
};

/// The maximum growth of the server's memory.
const MAX_GROWTH_KIB: u64 = 32 * 1024;

/// The interval between the calls of the well-behaved client.
const CALL_INTERVAL: Duration = Duration::from_millis(5);

/// The maximum p99 latency, as a multiple of that without an attack.
const MAX_SLOWDOWN: f64 = 2.0;

/// The pause between the steps of an endless attack.
const STEP: Duration = Duration::from_millis(10);

/// A kind of attack.
#[derive(Clone, Copy)]
struct Attack {
    name: &'static str,
    /// The number of concurrent attackers.
    workers: u32,
    /// The number of their addresses.
    addresses: u32,
    has_tls: bool,
    /// The attack, which each attacker repeats.
    work: fn(Target) -> Work,
}

type Work = Pin<Box<dyn Future<Output = io::Result<()>> + Send>>;

/// The attacked server, and the identity of an attacker.
#[derive(Clone)]
struct Target {
    address: SocketAddr,
    /// An access token of a user with a list of 1 MiB.
    token: Arc<str>,
    /// Access tokens of other users with the same list: the server limits the watches of each.
    watchers: Arc<[Arc<str>]>,
    /// The number of the attacker.
    worker: u32,
    /// The address of the attacker.
    client_ip: Ipv4Addr,
    /// The number of completed steps.
    steps: Arc<AtomicU64>,
}

macro_rules! attacks {
    ($($name:ident: $workers:literal $(from $addresses:literal)? $(over $tls:ident)?),+ $(,)?) => {
        const ATTACKS: &[Attack] = &[$(Attack {
            name: stringify!($name),
            workers: $workers,
            addresses: 1 $(- 1 + $addresses)?,
            has_tls: false $(|| { let $tls = true; $tls })?,
            work: |target| Box::pin($name(target)),
        }),+];

        /// One short test for each attack.
        mod briefly {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            #[ignore = "takes the whole machine: one at a time"]
            async fn $name() {
                super::run_attack(stringify!($name), super::Size::BRIEF).await.expect("within limits");
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
    decompression_bombs: 8,
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
    unread_watches: 8,
    watch_resets: 4,
    slow_watches: 8,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn other_clients_are_unaffected() {
    let only = std::env::var("TEST_ATTACK").ok();
    let mut failures = Vec::new();
    for attack in ATTACKS {
        if only.as_ref().is_none_or(|only| attack.name.contains(&**only)) {
            failures.extend(run_attack(attack.name, Size::FULL).await.err());
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// The duration of a test.
#[derive(Clone, Copy)]
struct Size {
    rounds: usize,
    round: Duration,
    /// Whether the latency is checked.
    is_timed: bool,
}

impl Size {
    const BRIEF: Self = Self { rounds: 1, round: Duration::from_secs(1), is_timed: false };
    const FULL: Self =
        Self { rounds: 5, round: Duration::from_secs(2), is_timed: !cfg!(debug_assertions) };
}

async fn run_attack(name: &'static str, size: Size) -> Result<(), String> {
    let attack = *ATTACKS.iter().find(|attack| attack.name == name).expect("a known attack");
    // An attacker has the lowest priority, and would not compress them within a brief test.
    LazyLock::force(&BOMBS);
    let service = Service::start(attack.has_tls).await;
    let before = service.server.memory_kib("VmRSS");
    service.reset_peak_memory();
    let (mut quiet, mut attacked) = (Duration::MAX, Duration::MAX);
    let mut steps = 0;
    for _ in 0..size.rounds {
        quiet = quiet.min(service.p99(size.round).await);
        let attackers = Attackers::start(attack, &service);
        attacked = attacked.min(service.p99(size.round).await);
        steps += attackers.stop();
    }
    let growth = service.server.memory_kib("VmHWM").saturating_sub(before);
    let slowdown = attacked.as_secs_f64() / quiet.as_secs_f64();
    let report = format!(
        "{name}: p99 {quiet:.2?}, attacked {attacked:.2?}, {slowdown:.1} times; memory {} MiB + \
         {} MiB; {steps} steps",
        before / 1024,
        growth.div_ceil(1024),
    );
    println!("{report}");
    let min_steps = if size.is_timed { attack.workers } else { 1 };
    assert!(steps >= u64::from(min_steps), "{steps} steps are no attack");
    service.assert_recovered().await;
    let is_fast = !size.is_timed || slowdown <= MAX_SLOWDOWN;
    if is_fast && growth <= MAX_GROWTH_KIB { Ok(()) } else { Err(report) }
}

impl Target {
    fn count_step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        priority::yield_cpu();
    }

    async fn sender(&self) -> io::Result<RawHttp2> {
        RawHttp2::connect(self.address, self.client_ip).await
    }

    async fn raw_client(&self, window: impl Into<Option<u32>>) -> io::Result<RawClient> {
        let raw = RawClient::connect_from(self.client_ip, self.address, window).await?;
        Ok(raw.with_metadata("authorization", format!("Bearer {}", self.token)))
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

/// Returns a request for the largest page that is batched.
fn largest_batchable_page() -> ListTodosRequest {
    ListTodosRequest { page_size: 100, ..ListTodosRequest::default() }
}
