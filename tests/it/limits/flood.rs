//! A flood of logins, 100 times as many as a thread of the service can check.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use argon2::Argon2;
use fast_zero::proto::{auth::v1::LoginRequest, todo::v1::ListTodosRequest};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::Bytes,
    client::conn::http2::{SendRequest, handshake},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::{
    net::TcpStream,
    runtime,
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::support::{
    Client, PASSWORD, app::connect, assert::assert_unauthenticated, parallel::join_all,
    postgres::TestDatabase, priority, process::Binary,
};

/// The hashing threads of the service under test, which has the default settings: one for each
/// core.
fn hashing_threads() -> usize {
    thread::available_parallelism().expect("known").get()
}

/// The memory of one hash, and the maximum that the flood may take in addition.
const HASH_KIB: u64 = 19 * 1024;
const MAX_OVERHEAD_KIB: u64 = 16 * 1024;

/// The rate of logins as a multiple of the rate that one thread can check.
const TIMES_CAPACITY: f64 = 100.0;

/// The number of usernames in the flood, too many to be locked out soon.
const NAMES: u32 = 4_096;

/// The network of the flood's client addresses, reserved for benchmarks (RFC 2544).
const CLIENT_NETWORK: u32 = 0xC612_0000;

/// The intervals at which the flood sends due logins and the reader reads.
const FLOOD_INTERVAL: Duration = Duration::from_millis(5);
const READ_INTERVAL: Duration = Duration::from_millis(10);

/// The maximum of the median latency of shed logins, less than a hash takes.
const MAX_SHED_LATENCY: Duration = Duration::from_millis(20);

/// The connections of the flood.
const CONNECTIONS: u32 = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "compares times: nothing else may run"]
async fn a_flood_of_logins_hardly_slows_reads() {
    let (rounds, length) = (9, Duration::from_secs(4));
    let Latencies { calm, flooded, per_second, logins } = flood(rounds, length).await;
    let shed = percentile(logins["OVERLOADED"].clone(), 50);
    assert!(shed < MAX_SHED_LATENCY, "half of the shed logins take longer than {shed:?}");
    let promised = per_second * (length * rounds).as_secs_f64();
    let logins = u32::try_from(logins.values().map(Vec::len).sum::<usize>()).expect("few");
    // The median of the rounds, because other load of the machine comes in bursts.
    let typical = |rounds: Vec<_>| {
        let slowest = rounds.into_iter().map(|times| percentile(times, 99));
        percentile(slowest.collect(), 50)
    };
    let (calm, flooded) = (typical(calm), typical(flooded));
    println!("p99 of reads in the median round: {calm:.2?} without, {flooded:.2?} with the flood");
    assert!(f64::from(logins) > 0.9 * promised, "{logins} logins instead of {promised}");
    assert!(flooded < 3 * calm, "the flood slows reads too much");
}

/// Checks memory and load shedding only, which do not depend on the speed of the machine.
#[tokio::test]
#[ignore = "takes the whole machine"]
async fn briefly() {
    flood(1, Duration::from_secs(2)).await;
}

/// Logins leave no core idle, and hashes take most of the time. PostgreSQL, the rest of the service
/// and this client share the cores with them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "compares times: nothing else may run"]
async fn logins_use_all_cores() {
    const ROUNDS: usize = 5;
    const LENGTH: Duration = Duration::from_secs(4);
    const MIN_BUSY: f64 = 0.95;
    /// Of the logins that nothing but hashes on all cores would be.
    const MIN_SHARE: f64 = 0.85;
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).env("RUST_LOG", "warn,fast_zero::server=info");
    let server = server.start();
    let address = server.address().await.parse().expect("an address");
    let client = Client::new(connect(address).await);
    // The logins of one account wait for each other.
    let names: Vec<_> = (0..4 * hashing_threads()).map(|number| format!("user{number}")).collect();
    for name in &names {
        client.create_user(name).await;
    }
    let (mut shares, mut busy) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let hashes = hashes_per_second(LENGTH);
        let before = CpuTime::now();
        let logins = logins_per_second(&client, &names, LENGTH).await;
        busy.push(CpuTime::now().busy_since(&before));
        shares.push(logins / hashes);
        println!(
            "{logins:.1} logins a second, {hashes:.1} hashes; busy: {:.3}",
            busy[busy.len() - 1]
        );
    }
    // The median of the rounds, because other load of the machine comes in bursts.
    let [share, busy] = [shares, busy].map(|mut rounds| {
        rounds.sort_by(f64::total_cmp);
        rounds[ROUNDS / 2]
    });
    assert!(busy >= MIN_BUSY, "the cores are busy for {busy:.3} of the time");
    assert!(share >= MIN_SHARE, "{share:.2} logins for each hash that the cores could compute");
}

/// The time of all cores since the system started, in ticks.
struct CpuTime {
    idle: u64,
    total: u64,
}

impl CpuTime {
    fn now() -> Self {
        let stat = std::fs::read_to_string("/proc/stat").expect("Linux");
        let line = stat.lines().next().expect("the sum of all cores");
        let times: Vec<u64> =
            line.split_whitespace().skip(1).map_while(|it| it.parse().ok()).collect();
        // The fourth and fifth are the idle time, without and with a wait for a disk. The first eight
        // are disjoint (proc_stat(5)).
        Self { idle: times[3] + times[4], total: times.iter().take(8).sum() }
    }

    /// Returns the share of the time in which the cores had work.
    fn busy_since(&self, before: &Self) -> f64 {
        let [idle, total] = [self.idle - before.idle, self.total - before.total]
            .map(|ticks| f64::from(u32::try_from(ticks).expect("a few seconds")));
        1.0 - idle / total
    }
}

/// Returns how many hashes all cores compute in a second.
fn hashes_per_second(length: Duration) -> f64 {
    let started = Instant::now();
    let hash = || {
        let params = argon2::Params::DEFAULT;
        let mut memory = vec![argon2::Block::new(); params.block_count()];
        let argon2 = Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params);
        let mut hashes = 0_u32;
        while started.elapsed() < length {
            let (password, salt, mut output) = (b"password", [0; 16], [0; 32]);
            argon2
                .hash_password_into_with_memory(password, &salt, &mut output, &mut memory)
                .expect("valid parameters");
            hashes += 1;
        }
        f64::from(hashes) / started.elapsed().as_secs_f64()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..hashing_threads()).map(|_| scope.spawn(hash)).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
    })
}

/// Returns how many logins the service completes in a second, with a login in progress for each
/// name.
async fn logins_per_second(client: &Client, names: &[String], length: Duration) -> f64 {
    let started = Instant::now();
    let logins = names.iter().map(|name| {
        let (client, name) = (client.clone(), name.clone());
        async move {
            let mut logins = 0_u32;
            while started.elapsed() < length {
                client.try_log_in(&name, PASSWORD).await.expect("logged in");
                logins += 1;
            }
            logins
        }
    });
    let logins: u32 = join_all(logins).await.into_iter().sum();
    f64::from(logins) / started.elapsed().as_secs_f64()
}

/// Latencies of calls.
#[derive(Default)]
struct Latencies {
    /// Reads without the flood, by round.
    calm: Vec<Vec<Duration>>,
    flooded: Vec<Vec<Duration>>,
    /// Logins of the flood, by reason of the error.
    logins: BTreeMap<String, Vec<Duration>>,
    /// The target rate of logins.
    per_second: f64,
}

/// Measures rounds, each with reads alone and with reads during the flood.
async fn flood(rounds: u32, length: Duration) -> Latencies {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url())
        .env("TRUSTED_PROXIES", "127.0.0.0/8")
        // This process reads the log, which would cost time during the flood.
        .env("RUST_LOG", "warn,fast_zero::server=info")
        .start();
    let address = server.address().await.parse().expect("an address");
    // Before the first hash, whose memory is released after a second.
    let before = server.memory_kib("VmRSS");
    let reader = Client::new(connect(address).await).signed_up("reader").await;
    for number in 0..20 {
        reader.create_todo(&number.to_string()).await;
    }
    let per_second = TIMES_CAPACITY * capacity(&reader).await;
    let mut latencies = Latencies { per_second, ..Latencies::default() };
    // Warm-up: the first reads open connections and fill caches.
    read(&reader, Duration::from_secs(1)).await;
    // A real flood comes from other machines. Here it has a lower priority than calls.
    let flood_runtime = runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .on_thread_start(priority::set_low)
        .enable_all()
        .build()
        .expect("a runtime");
    let flood = flood_runtime.spawn(Flood::new(address, per_second)).await.expect("connected");
    for _ in 0..rounds {
        latencies.calm.push(read(&reader, length).await);
        let flooding = flood_runtime.spawn(flood.clone().run(length));
        latencies.flooded.push(read(&reader, length).await);
        flooding.await.expect("no panic");
    }
    flood_runtime.shutdown_background();
    latencies.logins = flood.responses();
    let grown = server.memory_kib("VmHWM").saturating_sub(before);
    print(&latencies, per_second, length * rounds);
    println!("memory: {before} KiB before, at most {grown} KiB more");

    assert!(grown < hashing_threads() as u64 * HASH_KIB + MAX_OVERHEAD_KIB, "{grown} KiB");
    let allowed = ["INCORRECT_CREDENTIALS", "OVERLOADED", "TOO_MANY_ATTEMPTS"];
    let all_allowed = latencies.logins.keys().all(|reason| allowed.contains(&&**reason));
    assert!(all_allowed, "{:?}", latencies.logins.keys());
    assert!(latencies.logins.contains_key("OVERLOADED"), "the service shed logins");
    let output = server.output();
    let faults = output.lines().filter(|line| !line.contains("\"level\":\"INFO\""));
    assert_eq!(faults.collect::<Vec<_>>(), [""; 0]);
    latencies
}

/// Returns the number of logins that one thread can check in a second.
async fn capacity(client: &Client) -> f64 {
    let mut times = Vec::new();
    for _ in 0..9 {
        let started = Instant::now();
        let rejected = client.try_log_in("stranger", "wrong password").await;
        times.push(started.elapsed());
        assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
    }
    // Other load of the machine only makes hashes slower.
    let hash = times.into_iter().min().expect("not empty");
    1.0 / hash.as_secs_f64()
}

/// Reads every few milliseconds in an open loop. Returns the latency of each read, measured
/// from its due time.
async fn read(client: &Client, length: Duration) -> Vec<Duration> {
    let todo = client.list_todos(ListTodosRequest::default()).await.todos.remove(0);
    let mut reads = JoinSet::new();
    let started = tokio::time::Instant::now();
    let mut due = interval(READ_INTERVAL);
    for number in 0.. {
        let since = due.tick().await;
        if started.elapsed() > length {
            break;
        }
        let (client, id) = (client.clone(), todo.id.clone());
        reads.spawn(async move {
            let rejected = if number % 2 == 0 {
                client.try_get_todo(&id).await.err()
            } else {
                client.try_list_todos(ListTodosRequest::default()).await.err()
            };
            (since.elapsed(), rejected)
        });
    }
    let responses = reads.join_all().await;
    let (times, rejections): (Vec<_>, Vec<_>) = responses.into_iter().unzip();
    let rejections: Vec<_> = rejections.into_iter().flatten().collect();
    let rejected: Vec<_> = rejections.iter().map(Status::code).collect();
    assert_eq!(rejected, [], "all reads succeed");
    times
}

/// Logins of random users and clients. The client shares the machine with the server, so each
/// login is as cheap as possible.
#[derive(Clone)]
struct Flood {
    connections: Vec<SendRequest<Full<Bytes>>>,
    uri: http::Uri,
    messages: Vec<Bytes>,
    per_second: f64,
    responses: Arc<Mutex<Vec<(http::HeaderMap, Duration)>>>,
}

impl Flood {
    async fn new(address: SocketAddr, per_second: f64) -> Self {
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS {
            let stream = TcpStream::connect(address).await.expect("connected");
            stream.set_nodelay(true).expect("set");
            let (sender, connection) =
                handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
            tokio::spawn(connection);
            connections.push(sender);
        }
        let uri = format!("http://{address}/fastzero.auth.v1.AuthService/Login");
        let messages = (0..NAMES).map(|number| {
            let (login, password) = (format!("user{number}"), "wrong password".to_owned());
            frame(&LoginRequest { login, password })
        });
        let (uri, messages) = (uri.parse().expect("a valid address"), messages.collect());
        Self { connections, uri, messages, per_second, responses: Arc::default() }
    }

    /// Sends logins in an open loop at the target rate, and waits for all responses.
    async fn run(self, length: Duration) {
        let mut logins = JoinSet::new();
        let started = Instant::now();
        let mut due = interval(FLOOD_INTERVAL);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sent = 0.0;
        while started.elapsed() < length {
            due.tick().await;
            while sent < self.per_second * started.elapsed().as_secs_f64() {
                sent += 1.0;
                let login = self.log_in();
                let responses = self.responses.clone();
                logins.spawn(async move {
                    let response = login.await;
                    responses.lock().expect("no panic").push(response);
                    priority::yield_cpu();
                });
                while logins.try_join_next().is_some() {}
            }
        }
        logins.join_all().await;
    }

    fn log_in(&self) -> impl Future<Output = (http::HeaderMap, Duration)> + Send + 'static {
        let number = fastrand::usize(..);
        let client_ip = Ipv4Addr::from_bits(CLIENT_NETWORK + fastrand::u32(..1 << 17));
        let request = http::Request::post(self.uri.clone())
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("x-forwarded-for", client_ip.to_string())
            .body(Full::new(self.messages[number % self.messages.len()].clone()))
            .expect("a request");
        let mut connection = self.connections[number % self.connections.len()].clone();
        async move {
            let started = Instant::now();
            connection.ready().await.expect("an open connection");
            let response = connection.send_request(request).await.expect("a response");
            let (parts, body) = response.into_parts();
            body.collect().await.expect("the end of the body");
            (parts.headers, started.elapsed())
        }
    }

    /// Returns the latencies of all logins, by reason.
    fn responses(self) -> BTreeMap<String, Vec<Duration>> {
        let mut responses = BTreeMap::<_, Vec<_>>::new();
        for (headers, time) in self.responses.lock().expect("no panic").drain(..) {
            let rejected = Status::from_header_map(&headers).expect("a wrong password");
            let details = rejected.get_error_details();
            let reason = details.error_info().map_or_else(String::new, |info| info.reason.clone());
            let is_shed = ["OVERLOADED", "TOO_MANY_ATTEMPTS"].contains(&&*reason);
            assert_eq!(rejected.code() == Code::ResourceExhausted, is_shed, "{rejected:?}");
            responses.entry(reason).or_default().push(time);
        }
        responses
    }
}

/// Encodes a length-prefixed message of gRPC.
fn frame(message: &impl Message) -> Bytes {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).expect("a small message");
    Bytes::from([&[0][..], &length.to_be_bytes(), &message].concat())
}

fn percentile(mut times: Vec<Duration>, of: usize) -> Duration {
    times.sort();
    times[(times.len() * of / 100).min(times.len() - 1)]
}

fn print(latencies: &Latencies, per_second: f64, length: Duration) {
    let sent: usize = latencies.logins.values().map(Vec::len).sum();
    println!("{sent} logins in {length:?}; {per_second:.0}/s are {TIMES_CAPACITY} × the capacity");
    let reads =
        [("reads without", latencies.calm.concat()), ("reads during", latencies.flooded.concat())];
    let logins = latencies.logins.iter().map(|(reason, times)| (&**reason, times.clone()));
    for (what, times) in reads.into_iter().chain(logins) {
        let [half, most] = [50, 99].map(|of| percentile(times.clone(), of));
        println!("{what}: {}, p50 {half:.2?}, p99 {most:.2?}", times.len());
    }
}
