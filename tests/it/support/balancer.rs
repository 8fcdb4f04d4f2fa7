//! A proxy before replicas, as simple as an honest one can be: it balances calls, not
//! connections, and sends them to those replicas only whose health was SERVING when it last
//! asked. It repeats nothing: what cannot be sent is UNAVAILABLE for the caller.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::{Request, Response};
use http_body_util::{Either, Empty};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http2::{SendRequest, handshake},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{app::connect, wait::eventually};

/// How often a replica is asked for its health, and how long it may take to answer.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// A proxy. It ends when this is dropped.
pub struct Balancer {
    pub address: SocketAddr,
    replicas: Arc<Replicas>,
    closed: CancellationToken,
    _close: DropGuard,
}

#[derive(Default)]
struct Replicas {
    all: Mutex<Vec<Arc<Replica>>>,
    turn: AtomicUsize,
}

struct Replica {
    calls: SendRequest<Incoming>,
    is_serving: AtomicBool,
}

impl Balancer {
    /// Starts one that knows no replica yet.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let closed = CancellationToken::new();
        let replicas = Arc::<Replicas>::default();
        let accepting = accept(listener, replicas.clone(), closed.clone());
        tokio::spawn(closed.clone().run_until_cancelled_owned(accepting));
        Self { address, replicas, closed: closed.clone(), _close: closed.drop_guard() }
    }

    /// Makes a replica known, and waits until it gets calls.
    pub async fn add(&self, address: SocketAddr) {
        let stream = TcpStream::connect(address).await.expect("the replica answers");
        let (calls, connection) =
            handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
        tokio::spawn(connection);
        let replica = Arc::new(Replica { calls, is_serving: AtomicBool::new(false) });
        self.replicas.all.lock().expect("no test panicked here").push(replica.clone());
        let following = follow(replica.clone(), connect(address).await);
        tokio::spawn(self.closed.clone().run_until_cancelled_owned(following));
        eventually("the replica serves", async || replica.is_serving()).await;
    }
}

/// Asks a replica for its health, again and again.
async fn follow(replica: Arc<Replica>, channel: Channel) {
    let mut health = HealthClient::new(channel);
    loop {
        let answer = timeout(CHECK_TIMEOUT, health.check(HealthCheckRequest::default())).await;
        let status = answer.ok().and_then(Result::ok).map(|answer| answer.into_inner().status());
        replica.is_serving.store(status == Some(ServingStatus::Serving), Ordering::Relaxed);
        sleep(CHECK_INTERVAL).await;
    }
}

impl Replica {
    fn is_serving(&self) -> bool {
        self.is_serving.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, replicas: Arc<Replicas>, closed: CancellationToken) {
    while let Ok((stream, _)) = listener.accept().await {
        let replicas = replicas.clone();
        let service = service_fn(move |request| {
            let replicas = replicas.clone();
            async move { Ok::<_, Infallible>(replicas.forward(request).await) }
        });
        let connection = http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service);
        tokio::spawn(closed.clone().run_until_cancelled_owned(connection));
    }
}

type Answer = Response<Either<Incoming, Empty<Bytes>>>;

impl Replicas {
    async fn forward(&self, request: Request<Incoming>) -> Answer {
        let Some(replica) = self.next() else {
            return unavailable("no replica serves");
        };
        match replica.calls.clone().send_request(request).await {
            Ok(response) => response.map(Either::Left),
            Err(error) => unavailable(&error.to_string()),
        }
    }

    /// One after the other.
    fn next(&self) -> Option<Arc<Replica>> {
        let all = self.all.lock().expect("no test panicked here");
        let serving: Vec<_> = all.iter().filter(|replica| replica.is_serving()).collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        serving.get(turn.checked_rem(serving.len())?).map(|replica| (*replica).clone())
    }
}

fn unavailable(why: &str) -> Answer {
    Status::unavailable(why).into_http().map(Either::Right)
}
