//! Attacks on the real binary with the settings that it has by default, and what they cost
//! a caller who behaves.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use fast_zero::proto::todo::v1::{ListTodosRequest, Todo};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use prost::Message;
use tokio::{
    io::AsyncWriteExt,
    runtime,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::support::{
    Client,
    app::connect,
    certificates::{Authority, Secret},
    http2::{self, END_HEADERS, END_STREAM, OTHER_PEER, Sender, frame},
    metrics::Scrape,
    postgres::TestDatabase,
    priority,
    process::{Process, Run},
    todos::titled,
    wait::eventually,
    wire::{Wire, endless, whole},
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
    resets_of_calls_under_way: 4,
    half_open_connections: 1000 from 4,
    half_open_handshakes: 250 over tls,
    half_a_header_list: 250,
    connections_too_many: 1000,
    continuation_floods: 8,
    large_header_lists: 40,
    small_headers: 40,
    header_lists_too_large: 4,
    hpack_bombs: 8,
    giant_messages: 8,
    truncated_messages: 4,
    requests_almost_whole: 8,
    slow_readers: 8,
    readers_of_nothing: 8,
    readers_of_no_errors: 32,
    readers_of_no_reflection: 8,
    slow_senders: 8,
    pings: 2,
    settings: 2,
    empty_window_updates: 4,
    calls_without_a_body: 40,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn nobody_else_notices() {
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
    let before = service.server.memory("VmRSS");
    service.forget_peak();
    let (mut quiet, mut attacked) = (Duration::MAX, Duration::MAX);
    let mut done = 0;
    for _ in 0..size.rounds {
        quiet = quiet.min(service.p99(size.round).await);
        let attackers = Attackers::begin(attack, &service);
        attacked = attacked.min(service.p99(size.round).await);
        done += attackers.end();
    }
    let growth = service.server.memory("VmHWM").saturating_sub(before);
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

/// The real binary, and a caller of it who behaves.
struct Service {
    server: Process,
    address: SocketAddr,
    metrics: SocketAddr,
    caller: Client,
    todo: Todo,
    _database: TestDatabase,
    _secret: Option<Secret>,
}

impl Service {
    async fn start(has_tls: bool) -> Self {
        let database = TestDatabase::create().await;
        let authority = Authority::new();
        let secret = has_tls.then(|| Secret::new(&authority.pair(), None));
        let run = Run::server(&database.url())
            .env("METRICS_ADDR", "127.0.0.1:0")
            .env("RUST_LOG", "warn,fast_zero::server=info");
        let run = secret
            .iter()
            .flat_map(Secret::variables)
            .fold(run, |run, (name, path)| run.env(name, &path));
        let server = run.start();
        let address = server.address().await.parse().expect("an address");
        let metrics = server.metrics_address().await.parse().expect("an address");
        let channel = if has_tls {
            authority.caller().connect(address).await.expect("connected")
        } else {
            connect(address).await
        };
        let (caller, todo) = signed_up_elsewhere(&database).await;
        let caller = caller.through(&channel);
        let service =
            Self { server, address, metrics, caller, todo, _database: database, _secret: secret };
        service.caller.list_todos(all()).await;
        // All that is done once is done.
        service.p99(Duration::from_millis(500)).await;
        service
    }

    /// How long all but the slowest hundredth of the caller's calls take.
    async fn p99(&self, round: Duration) -> Duration {
        let begun = Instant::now();
        let mut times = Vec::new();
        let mut ticks = interval(CALL_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while begun.elapsed() < round {
            ticks.tick().await;
            let called = Instant::now();
            self.caller.get_todo(&self.todo.id).await;
            times.push(called.elapsed());
        }
        times.sort_unstable();
        times[(times.len() * 99).div_ceil(100) - 1]
    }

    /// Begins to look for the peak anew.
    fn forget_peak(&self) {
        let path = format!("/proc/{}/clear_refs", self.server.pid());
        fs::write(path, "5").expect("it is allowed to who started it");
    }

    /// Afterwards it works, nothing of the attack is left, and nothing went wrong.
    async fn recovers(&self) {
        eventually("only the caller is left", async || {
            let scrape = Scrape::of(self.metrics).await;
            let gauge = |name| scrape.get(name);
            gauge("fastzero_calls_in_flight") == Some(0.0)
                && gauge("fastzero_connections") == Some(1.0)
        })
        .await;
        self.caller.list_todos(all()).await;
        let output = self.server.output();
        assert!(
            !output.contains("panicked") && !output.contains("\"level\":\"ERROR\""),
            "{output}"
        );
    }
}

/// A user whose list has a MiB, and one of their to-dos, by way of another replica: the memory of
/// a hash stays for a while, and would hide that of an attack.
async fn signed_up_elsewhere(database: &TestDatabase) -> (Client, Todo) {
    let replica = Run::server(&database.url()).start();
    let address = replica.address().await.parse().expect("an address");
    let caller = Client::new(connect(address).await).signed_up("ana").await;
    let todo = caller.create_todo("a").await;
    let description = "x".repeat(10_000);
    for _ in 0..100 {
        caller.create(Todo { description: description.clone(), ..titled("a") }).await;
    }
    (caller, todo)
}

/// Those who attack, on a thread of their own, as somebody else. Elsewhere they have a
/// machine of their own: here they take what the service and its caller leave.
struct Attackers {
    stop: CancellationToken,
    done: Arc<AtomicU64>,
    thread: thread::JoinHandle<()>,
}

impl Attackers {
    fn begin(attack: Attack, service: &Service) -> Self {
        let (stop, done) = <(CancellationToken, Arc<AtomicU64>)>::default();
        let token = Arc::from(&*service.caller.tokens().access_token);
        let (address, peer) = (service.address, OTHER_PEER);
        let target = Target { address, token, worker: 0, peer, done: done.clone() };
        let until = stop.clone();
        let thread = thread::spawn(move || {
            priority::lowest();
            let runtime = runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                for worker in 0..attack.workers {
                    let peer = Ipv4Addr::from_bits(OTHER_PEER.to_bits() + worker % attack.peers);
                    let target = Target { worker, peer, ..target.clone() };
                    tokio::spawn(priority::giving_way(again_and_again(attack, target)));
                }
                until.cancelled().await;
            });
        });
        Self { stop, done, thread }
    }

    fn end(self) -> u64 {
        self.stop.cancel();
        self.thread.join().expect("the attackers do not panic");
        self.done.load(Ordering::Relaxed)
    }
}

async fn again_and_again(attack: Attack, target: Target) {
    loop {
        // The server may refuse anything.
        let _ = (attack.work)(target.clone()).await;
        sleep(Duration::from_millis(100)).await;
    }
}

impl Target {
    fn done(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
        priority::give_way();
    }

    async fn sender(&self) -> io::Result<Sender> {
        Sender::connect(self.address, self.peer).await
    }

    async fn wire(&self, window: impl Into<Option<u32>>) -> io::Result<Wire> {
        let wire = Wire::connect_from(self.peer, self.address, window).await?;
        Ok(wire.with("authorization", format!("Bearer {}", self.token)))
    }

    fn call(&self, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
        let bearer = format!("Bearer {}", self.token);
        let mut headers = vec![("authorization", &*bearer)];
        headers.extend(more);
        http2::call(path, &headers)
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

/// CVE-2023-44487: as many calls as can be, each reset at once. At 40 000 a second, all
/// together: more would only measure the attacker.
async fn rapid_resets(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(GET, &[]);
    loop {
        let mut pairs = Vec::new();
        for _ in 0..100 {
            let id = sender.new_id();
            pairs.extend(frame(http2::HEADERS, END_HEADERS, id, &block));
            pairs.extend(frame(http2::RST_STREAM, 0, id, &8_u32.to_be_bytes()));
        }
        sender.send(&pairs).await?;
        target.done();
        sleep(STEP).await;
    }
}

/// The same for calls that the service has begun to answer.
async fn resets_of_calls_under_way(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(GET, &[]);
    loop {
        let ids: Vec<_> = (0..10).map(|_| sender.new_id()).collect();
        for id in &ids {
            sender.send(&frame(http2::HEADERS, END_HEADERS, *id, &block)).await?;
        }
        sleep(STEP / 2).await;
        for id in ids {
            sender.send(&frame(http2::RST_STREAM, 0, id, &8_u32.to_be_bytes())).await?;
        }
        target.done();
        sleep(STEP / 2).await;
    }
}

/// Four times as many connections as one address may have, which are closed at once and come
/// again: 7 000 a second from all together.
async fn connections_too_many(target: Target) -> io::Result<()> {
    say(&target, http2::PREFACE).await
}

/// Connections that say nothing, half of what they should, or nonsense.
async fn half_open_connections(target: Target) -> io::Result<()> {
    let said = [&b""[..], &http2::PREFACE[..14], b"\x16\x03\x01\x02\x00\x01", http2::PREFACE];
    say(&target, said[target.worker as usize % said.len()]).await
}

/// Half of a handshake of TLS: nothing, a little, or the most that may come before its end.
async fn half_open_handshakes(target: Target) -> io::Result<()> {
    let mut long = b"\x16\x03\x01\x40\x00\x01\x00\xff\xff".to_vec();
    long.resize(5 + 0x4000, 0);
    let more = [b"\x16\x03\x01\x40\x00".to_vec(), vec![0; 0x4000]].concat();
    let longest = [&long[..], &more, &more, &more[..more.len() - 100]].concat();
    let said = [b"", &b"\x16\x03\x01\x02\x00\x01"[..], &long, &longest];
    say(&target, said[target.worker as usize % said.len()]).await
}

/// Header lists that do not end.
async fn half_a_header_list(target: Target) -> io::Result<()> {
    let block = &target.call(GET, &[("a", &"x".repeat(15_000))])[..15_000];
    let half = frame(http2::HEADERS, 0, 1, block);
    let said = [http2::PREFACE, &half, &half[..14_000]].concat();
    say(&target, &said[..said.len() - (target.worker as usize % 2) * 14_000]).await
}

/// Says this on a connection, and waits for its end.
async fn say(target: &Target, said: &[u8]) -> io::Result<()> {
    let mut stream = http2::tcp(target.address, target.peer).await?;
    stream.write_all(said).await?;
    target.done();
    let (mut read, _write) = stream.split();
    tokio::io::copy(&mut read, &mut tokio::io::sink()).await.map(drop)
}

/// Header lists of ever more frames (CVE-2024-27316).
async fn continuation_floods(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    sender.send(&frame(http2::HEADERS, 0, 1, &target.call(GET, &[]))).await?;
    let more =
        [&b""[..], &http2::literal(0, "a", "b"), &http2::literal(0, "a", &"x".repeat(10_000))];
    let more = frame(http2::CONTINUATION, 0, 1, more[target.worker as usize % 3]);
    loop {
        sender.send(&more.repeat(20)).await?;
        target.done();
        sleep(STEP).await;
    }
}

/// Calls with as much metadata as they may have, and without a body: 400 a second from all
/// together.
async fn large_header_lists(target: Target) -> io::Result<()> {
    many(&target, &target.call(GET, &[("a", &"x".repeat(15_000))]), 10).await
}

/// The same with the same size in many entries: 200 a second.
async fn small_headers(target: Target) -> io::Result<()> {
    many(&target, &target.call(GET, &[("a", ""); 440]), 5).await
}

/// 800 a second.
async fn calls_without_a_body(target: Target) -> io::Result<()> {
    many(&target, &target.call(GET, &[]), 20).await
}

/// Calls without a body, until the connection ends.
async fn many(target: &Target, block: &[u8], per_second: u32) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let mut ticks = interval(Duration::from_secs(1) / per_second);
    loop {
        ticks.tick().await;
        let id = sender.new_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, block)).await?;
        target.done();
    }
}

async fn header_lists_too_large(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(GET, &[("a", &"x".repeat(8_000)), ("b", &"x".repeat(8_400))]);
    loop {
        let id = sender.new_id();
        let (begin, end) = block.split_at(16_000);
        sender.send(&frame(http2::HEADERS, END_STREAM, id, begin)).await?;
        sender.send(&frame(http2::CONTINUATION, END_HEADERS, id, end)).await?;
        target.done();
        sleep(STEP).await;
    }
}

/// A large entry of the table, named again and again by one byte.
async fn hpack_bombs(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    loop {
        let mut block = target.call(GET, &[]);
        block.extend(http2::literal(0x40, "a", &"x".repeat(3_900)));
        block.extend([0xbe].repeat(if target.worker.is_multiple_of(2) { 2 } else { 10_000 }));
        let id = sender.new_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, &block)).await?;
        target.done();
        sleep(STEP).await;
    }
}

/// Messages far larger than they may be, which promise to be larger still, or to be as large
/// as they may be.
async fn giant_messages(target: Target) -> io::Result<()> {
    let mut wire = target.wire(None).await?;
    let mut giant = vec![0xff; 4 * 1024 * 1024];
    let promised: u32 = if target.worker.is_multiple_of(2) { u32::MAX } else { 1024 * 1024 };
    giant[..5].copy_from_slice(&[&[0][..], &promised.to_be_bytes()].concat());
    let giant = Bytes::from(giant);
    loop {
        let answer = wire.send(CREATE, whole(giant.clone())).await;
        answer.map_err(io::Error::other)?;
        target.done();
        sleep(STEP * 5).await;
    }
}

/// Messages that end before their length.
async fn truncated_messages(target: Target) -> io::Result<()> {
    let mut wire = target.wire(None).await?;
    loop {
        let cut = Bytes::from_static(b"\0\0\0\xff\xff\x0a\x05");
        wire.send(CREATE, whole(cut)).await.map_err(io::Error::other)?;
        target.done();
        sleep(STEP).await;
    }
}

/// The largest messages, but for their last byte.
async fn requests_almost_whole(target: Target) -> io::Result<()> {
    let wire = target.wire(None).await?;
    let mut message = http2::message(&vec![0; 1024 * 1024]);
    message.pop();
    let message = Bytes::from(message);
    for _ in 0..STREAMS {
        let (mut wire, message, target) = (wire.clone(), message.clone(), target.clone());
        tokio::spawn(async move {
            let answer = wire.send(CREATE, endless(message)).await;
            target.done();
            drop(answer);
        });
    }
    until_closed(&wire).await;
    Ok(())
}

/// Large answers of which somebody reads a KiB now and then.
async fn slow_readers(target: Target) -> io::Result<()> {
    read(target, 1024, Some(STEP)).await
}

/// Large answers of which nobody reads anything.
async fn readers_of_nothing(target: Target) -> io::Result<()> {
    let window = if target.worker.is_multiple_of(2) { 0 } else { 1024 };
    read(target, window, None).await
}

/// Asks for lists until the connection ends, and reads a frame after each pause, or none.
async fn read(target: Target, window: u32, pause: Option<Duration>) -> io::Result<()> {
    let wire = target.wire(window).await?;
    let request = Bytes::from(http2::message(&all().encode_to_vec()));
    for _ in 0..STREAMS {
        let (mut wire, request, target) = (wire.clone(), request.clone(), target.clone());
        tokio::spawn(async move {
            loop {
                let answer = wire.send(LIST, whole(request.clone())).await;
                let Ok(mut answer) = answer else { return };
                target.done();
                read_slowly(answer.body_mut(), pause).await;
                sleep(STEP * 10).await;
            }
        });
        sleep(STEP).await;
    }
    until_closed(&wire).await;
    Ok(())
}

async fn read_slowly(body: &mut Incoming, pause: Option<Duration>) {
    if hyper::body::Body::is_end_stream(body) {
        return;
    }
    let Some(pause) = pause else {
        return std::future::pending().await;
    };
    while let Some(Ok(_)) = body.frame().await {
        sleep(pause).await;
    }
}

async fn until_closed(wire: &Wire) {
    while !wire.is_closed() {
        sleep(STEP * 10).await;
    }
}

/// Calls that are answered at once, with answers that nobody reads: 3 200 a second from all
/// together.
async fn readers_of_no_errors(target: Target) -> io::Result<()> {
    let mut stream = http2::deaf(target.address, target.peer).await?;
    stream.write_all(http2::PREFACE).await?;
    let block = target.call("/no.Such/Method", &[]);
    let mut id = 1_u32;
    loop {
        let mut calls = Vec::new();
        for _ in 0..4 {
            calls.extend(frame(http2::HEADERS, END_HEADERS | END_STREAM, id, &block));
            id += 2;
        }
        stream.write_all(&calls).await?;
        target.done();
        sleep(STEP * 4).await;
    }
}

/// Descriptors that nobody reads.
async fn readers_of_no_reflection(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    sender.send(&http2::setting(http2::INITIAL_WINDOW_SIZE, 0)).await?;
    let block = target.call("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", &[]);
    let symbol = b"fastzero.todo.v1.TodoService";
    let question = [&[0x22, u8::try_from(symbol.len()).expect("short")], &symbol[..]].concat();
    let questions = http2::message(&question).repeat(8);
    for _ in 0..STREAMS {
        let id = sender.new_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, &block)).await?;
        sender.send(&frame(http2::DATA, 0, id, &questions)).await?;
        target.done();
    }
    sender.closed().await;
    Ok(())
}

/// Requests that come byte by byte.
async fn slow_senders(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(CREATE, &[]);
    let ids: Vec<_> = (0..STREAMS).map(|_| sender.new_id()).collect();
    for id in &ids {
        sender.send(&frame(http2::HEADERS, END_HEADERS, *id, &block)).await?;
        sender.send(&frame(http2::DATA, 0, *id, &[0, 0, 0, 0xff, 0xff])).await?;
    }
    loop {
        for id in &ids {
            sender.send(&frame(http2::DATA, 0, *id, b"x")).await?;
        }
        target.done();
        sleep(STEP * 10).await;
    }
}

/// 10 000 a second from each.
async fn pings(target: Target) -> io::Result<()> {
    flood(target, &frame(http2::PING, 0, 0, &[0; 8])).await
}

/// 10 000 a second from each.
async fn settings(target: Target) -> io::Result<()> {
    flood(target, &http2::setting(http2::INITIAL_WINDOW_SIZE, 65_535)).await
}

async fn flood(target: Target, frame: &[u8]) -> io::Result<()> {
    let mut sender = target.sender().await?;
    loop {
        sender.send(&frame.repeat(100)).await?;
        target.done();
        sleep(STEP).await;
    }
}

/// Which is an error of the stream, or of the connection.
async fn empty_window_updates(target: Target) -> io::Result<()> {
    let mut sender = target.sender().await?;
    let block = target.call(CREATE, &[]);
    loop {
        let id = sender.new_id();
        sender.send(&frame(http2::HEADERS, END_HEADERS, id, &block)).await?;
        let of = if target.worker == 0 { 0 } else { id };
        sender.send(&frame(http2::WINDOW_UPDATE, 0, of, &[0; 4])).await?;
        target.done();
        sleep(STEP / 10).await;
    }
}
