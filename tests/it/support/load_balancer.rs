//! A minimal load balancer. It balances calls, not connections, among the replicas whose last
//! health check was SERVING. It retries nothing: a call that it cannot forward fails with
//! UNAVAILABLE.

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

use super::{app::connect, wait::wait_until};

/// The interval and the timeout of health checks.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// A load balancer. It stops when it is dropped.
pub struct LoadBalancer {
    pub address: SocketAddr,
    replicas: Arc<Replicas>,
    closed: CancellationToken,
    _close: DropGuard,
}

#[derive(Default)]
struct Replicas {
    all: Mutex<Vec<Arc<Replica>>>,
    next: AtomicUsize,
}

struct Replica {
    calls: SendRequest<Incoming>,
    is_serving: AtomicBool,
}

impl LoadBalancer {
    /// Starts a load balancer without replicas.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let closed = CancellationToken::new();
        let replicas = Arc::<Replicas>::default();
        let accepting = accept(listener, replicas.clone(), closed.clone());
        tokio::spawn(closed.clone().run_until_cancelled_owned(accepting));
        Self { address, replicas, closed: closed.clone(), _close: closed.drop_guard() }
    }

    /// Adds a replica, and waits until it receives calls.
    pub async fn add(&self, address: SocketAddr) {
        let stream = TcpStream::connect(address).await.expect("the replica accepts connections");
        let (calls, connection) =
            handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
        tokio::spawn(connection);
        let replica = Arc::new(Replica { calls, is_serving: AtomicBool::new(false) });
        self.replicas.all.lock().expect("not poisoned").push(replica.clone());
        let checking = check_health(replica.clone(), connect(address).await);
        tokio::spawn(self.closed.clone().run_until_cancelled_owned(checking));
        wait_until("the replica serves", async || replica.is_serving()).await;
    }
}

/// Checks the health of a replica periodically.
async fn check_health(replica: Arc<Replica>, channel: Channel) {
    let mut health = HealthClient::new(channel);
    loop {
        let result = timeout(CHECK_TIMEOUT, health.check(HealthCheckRequest::default())).await;
        let response = result.ok().and_then(Result::ok);
        let status = response.map(|response| response.into_inner().status());
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

type ProxyResponse = Response<Either<Incoming, Empty<Bytes>>>;

impl Replicas {
    async fn forward(&self, request: Request<Incoming>) -> ProxyResponse {
        let Some(replica) = self.next_replica() else {
            return unavailable("no replica serves");
        };
        match replica.calls.clone().send_request(request).await {
            Ok(response) => response.map(Either::Left),
            Err(error) => unavailable(&error.to_string()),
        }
    }

    /// Selects the serving replicas in turn (round robin).
    fn next_replica(&self) -> Option<Arc<Replica>> {
        let all = self.all.lock().expect("not poisoned");
        let serving: Vec<_> = all.iter().filter(|replica| replica.is_serving()).collect();
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        serving.get(next.checked_rem(serving.len())?).map(|replica| (*replica).clone())
    }
}

fn unavailable(message: &str) -> ProxyResponse {
    Status::unavailable(message).into_http().map(Either::Right)
}
