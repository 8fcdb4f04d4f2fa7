//! A flood of logins, a hundred times as many as the service can check, costs others little.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

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
    Client, app::connect, assert::assert_unauthenticated, postgres::TestDatabase, priority,
    process::Binary,
};

/// What the service under test hashes with, at the real cost.
const HASHING_THREADS: u64 = 1;

/// In KiB: what a hash needs, and what the flood itself may take besides.
const HASH: u64 = 19 * 1024;
const ELSE: u64 = 16 * 1024;

/// Logins for each that could be checked.
const TIMES_CAPACITY: f64 = 100.0;

/// Whom the flood logs in as: more names than are locked soon.
const NAMES: u32 = 4_096;

/// Where it says that it comes from: a network for tests of speed (RFC 2544).
const PEERS: u32 = 0xC612_0000;

/// How often the flood sends what is due, and how often a reader reads.
const FLOOD_EVERY: Duration = Duration::from_millis(5);
const READ_EVERY: Duration = Duration::from_millis(10);

/// In which half of what is turned away knows it: less than a hash takes.
const AT_ONCE: Duration = Duration::from_millis(20);

/// Over which the flood comes.
const CONNECTIONS: u32 = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "compares times: nothing else may run"]
async fn a_flood_of_logins_hardly_slows_reads() {
    let (rounds, length) = (9, Duration::from_secs(4));
    let Figures { calm, flooded, per_second, logins } = flood(rounds, length).await;
    let turned_away = percentile(logins["OVERLOADED"].clone(), 50);
    assert!(turned_away < AT_ONCE, "what is turned away is told so late: {turned_away:?}");
    let promised = per_second * (length * rounds).as_secs_f64();
    let logins = u32::try_from(logins.values().map(Vec::len).sum::<usize>()).expect("few");
    // Of the rounds, the one in the middle: what else the machine does comes in bursts.
    let typical = |rounds: Vec<_>| {
        let slowest = rounds.into_iter().map(|times| percentile(times, 99));
        percentile(slowest.collect(), 50)
    };
    let (calm, flooded) = (typical(calm), typical(flooded));
    println!("p99 of reads in a typical round: {calm:.2?} without, {flooded:.2?} with the flood");
    assert!(
        f64::from(logins) > 0.9 * promised,
        "{logins} logins are no flood: it was to be {promised}"
    );
    assert!(flooded < 3 * calm, "it costs readers too much");
}

/// Neither the memory nor who is turned away is a question of time.
#[tokio::test]
#[ignore = "takes the whole machine"]
async fn briefly() {
    flood(1, Duration::from_secs(2)).await;
}

/// How long calls took.
#[derive(Default)]
struct Figures {
    /// Reads, of each round.
    calm: Vec<Vec<Duration>>,
    flooded: Vec<Vec<Duration>>,
    /// Of the flood, by what came of them.
    logins: BTreeMap<String, Vec<Duration>>,
    /// How many there were to be.
    per_second: f64,
}

/// As many rounds, each of reads alone and of reads within the flood.
async fn flood(rounds: u32, length: Duration) -> Figures {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url())
        .env("HASHING_THREADS", &HASHING_THREADS.to_string())
        .env("TRUSTED_PROXIES", "127.0.0.0/8")
        // Nobody but this process reads the log, and it has enough to do.
        .env("RUST_LOG", "warn,fast_zero::server=info")
        .start();
    let address = server.address().await.parse().expect("an address");
    // Before the first hash: its memory stays for a second.
    let before = server.memory_kib("VmRSS");
    let reader = Client::new(connect(address).await).signed_up("reader").await;
    for number in 0..20 {
        reader.create_todo(&number.to_string()).await;
    }
    let per_second = TIMES_CAPACITY * capacity(&reader).await;
    let mut figures = Figures { per_second, ..Figures::default() };
    // Not counted: the first of each kind open connections and fill caches.
    read(&reader, Duration::from_secs(1)).await;
    // Elsewhere, the flood has machines of its own: here it takes what others leave.
    let elsewhere = runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .on_thread_start(priority::set_lowest)
        .enable_all()
        .build()
        .expect("a runtime");
    let flood = elsewhere.spawn(Flood::new(address, per_second)).await.expect("connected");
    for _ in 0..rounds {
        figures.calm.push(read(&reader, length).await);
        let flooding = elsewhere.spawn(flood.clone().run(length));
        figures.flooded.push(read(&reader, length).await);
        flooding.await.expect("no panic");
    }
    elsewhere.shutdown_background();
    figures.logins = flood.answers();
    let grown = server.memory_kib("VmHWM").saturating_sub(before);
    print(&figures, per_second, length * rounds);
    println!("memory: {before} KiB before, at the most {grown} KiB more");

    assert!(grown < HASHING_THREADS * HASH + ELSE, "{grown} KiB");
    let allowed = ["INCORRECT_CREDENTIALS", "OVERLOADED", "TOO_MANY_ATTEMPTS"];
    let all_allowed =
        figures.logins.keys().all(|read_rpc_result| allowed.contains(&&**read_rpc_result));
    assert!(all_allowed, "{:?}", figures.logins.keys());
    assert!(figures.logins.contains_key("OVERLOADED"), "it was a flood");
    let output = server.output();
    let faults = output.lines().filter(|line| !line.contains("\"level\":\"INFO\""));
    assert_eq!(faults.collect::<Vec<_>>(), [""; 0]);
    figures
}

/// Logins that can be checked in a second.
async fn capacity(client: &Client) -> f64 {
    let mut times = Vec::new();
    for _ in 0..9 {
        let begun = Instant::now();
        let refused = client.try_log_in("nobody", "wrong password").await;
        times.push(begun.elapsed());
        assert_unauthenticated(refused, "INCORRECT_CREDENTIALS");
    }
    // What else the machine does makes some of them longer.
    let hash = times.into_iter().min().expect("some");
    1.0 / hash.as_secs_f64()
}

/// Reads every few milliseconds, whether earlier reads are answered or not: how long each
/// took from when it was due.
async fn read(client: &Client, length: Duration) -> Vec<Duration> {
    let todo = client.list_todos(ListTodosRequest::default()).await.todos.remove(0);
    let mut reads = JoinSet::new();
    let begun = tokio::time::Instant::now();
    let mut due = interval(READ_EVERY);
    for number in 0.. {
        let since = due.tick().await;
        if begun.elapsed() > length {
            break;
        }
        let (client, id) = (client.clone(), todo.id.clone());
        reads.spawn(async move {
            let refused = if number % 2 == 0 {
                client.try_get_todo(&id).await.err()
            } else {
                client.try_list_todos(ListTodosRequest::default()).await.err()
            };
            (since.elapsed(), refused)
        });
    }
    let answers = reads.join_all().await;
    let (times, refusals): (Vec<_>, Vec<_>) = answers.into_iter().unzip();
    let refusals: Vec<_> = refusals.into_iter().flatten().collect();
    let refused: Vec<_> = refusals.iter().map(Status::code).collect();
    assert_eq!(refused, [], "reads go on");
    times
}

/// Anybody's logins, made as cheaply as can be: the client is on the same machine.
#[derive(Clone)]
struct Flood {
    connections: Vec<SendRequest<Full<Bytes>>>,
    uri: http::Uri,
    messages: Vec<Bytes>,
    per_second: f64,
    answers: Arc<Mutex<Vec<(http::HeaderMap, Duration)>>>,
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
        let (uri, messages) = (uri.parse().expect("a good address"), messages.collect());
        Self { connections, uri, messages, per_second, answers: Arc::default() }
    }

    /// Logs in as often as it should, whatever becomes of it, and waits for the answers.
    async fn run(self, length: Duration) {
        let mut logins = JoinSet::new();
        let begun = Instant::now();
        let mut due = interval(FLOOD_EVERY);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sent = 0.0;
        while begun.elapsed() < length {
            due.tick().await;
            while sent < self.per_second * begun.elapsed().as_secs_f64() {
                sent += 1.0;
                let login = self.log_in();
                let answers = self.answers.clone();
                logins.spawn(async move {
                    let answer = login.await;
                    answers.lock().expect("no panic").push(answer);
                    priority::yield_cpu();
                });
                while logins.try_join_next().is_some() {}
            }
        }
        logins.join_all().await;
    }

    fn log_in(&self) -> impl Future<Output = (http::HeaderMap, Duration)> + Send + 'static {
        let number = fastrand::usize(..);
        let peer = Ipv4Addr::from_bits(PEERS + fastrand::u32(..1 << 17));
        let request = http::Request::post(self.uri.clone())
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("x-forwarded-for", peer.to_string())
            .body(Full::new(self.messages[number % self.messages.len()].clone()))
            .expect("a request");
        let mut connection = self.connections[number % self.connections.len()].clone();
        async move {
            let begun = Instant::now();
            connection.ready().await.expect("the connection lives");
            let answer = connection.send_request(request).await.expect("an answer");
            let (parts, body) = answer.into_parts();
            body.collect().await.expect("its end");
            (parts.headers, begun.elapsed())
        }
    }

    /// All answers, by their reason.
    fn answers(self) -> BTreeMap<String, Vec<Duration>> {
        let mut answers = BTreeMap::<_, Vec<_>>::new();
        for (headers, time) in self.answers.lock().expect("no panic").drain(..) {
            let refused = Status::from_header_map(&headers).expect("no password is right");
            let details = refused.get_error_details();
            let reason = details.error_info().map_or_else(String::new, |info| info.reason.clone());
            let is_shed = ["OVERLOADED", "TOO_MANY_ATTEMPTS"].contains(&&*reason);
            assert_eq!(refused.code() == Code::ResourceExhausted, is_shed, "{refused:?}");
            answers.entry(reason).or_default().push(time);
        }
        answers
    }
}

/// A message as gRPC sends it.
fn frame(message: &impl Message) -> Bytes {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).expect("a small one");
    Bytes::from([&[0][..], &length.to_be_bytes(), &message].concat())
}

fn percentile(mut times: Vec<Duration>, of: usize) -> Duration {
    times.sort();
    times[(times.len() * of / 100).min(times.len() - 1)]
}

fn print(figures: &Figures, per_second: f64, length: Duration) {
    let sent: usize = figures.logins.values().map(Vec::len).sum();
    println!("{sent} logins in {length:?}; {per_second:.0}/s are {TIMES_CAPACITY} × the capacity");
    let reads =
        [("reads without it", figures.calm.concat()), ("within it", figures.flooded.concat())];
    let logins = figures.logins.iter().map(|(reason, times)| (&**reason, times.clone()));
    for (what, times) in reads.into_iter().chain(logins) {
        let [half, most] = [50, 99].map(|of| percentile(times.clone(), of));
        println!("{what}: {}, p50 {half:.2?}, p99 {most:.2?}", times.len());
    }
}
