//! Everything is wired here: services, connections, start and stop.

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use http::uri::Scheme;
use sqlx::postgres::PgConnectOptions;
use tokio::{
    net::TcpListener,
    task::JoinHandle,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, service::Routes, transport::Channel};

use crate::{
    admission::{LARGE_ANSWERS_PER_PEER, MAX_REQUEST_BYTES, calls_per_peer},
    auth::{
        AccessTokens, RefreshTokens,
        attempts::Attempts,
        guard::{Authenticator, Methods},
        service::AuthService,
    },
    call::{Api, DEFAULT_DEADLINE, Gateway},
    caller::LiveSessions,
    coalesce::Coalescer,
    config::Config,
    connection::Acceptor,
    database::{self, Database, HealthCheck},
    error::Error,
    health::Reporter,
    keys::Keyring,
    metrics::{Metrics, ScrapeSources},
    metrics_server::MetricsServer,
    pagination::PageTokens,
    password::Hasher,
    peers::{self, Peers},
    proto::{
        DESCRIPTORS, auth::v1::auth_service_server::AuthServiceServer,
        todo::v1::todo_service_server::TodoServiceServer,
        user::v1::user_service_server::UserServiceServer,
    },
    telemetry, tls,
    todo::service::TodoService,
    traces::{self, Traces},
    types::error_chain::{BoxError, ErrorChain},
    user::{service::UserService, sign_ups::SignUps},
};

/// The health names that need the database; `""` is the server as a whole.
const READINESS: [&str; 4] = [
    "",
    <AuthServiceServer<AuthService> as NamedService>::NAME,
    <TodoServiceServer<TodoService> as NamedService>::NAME,
    <UserServiceServer<UserService> as NamedService>::NAME,
];

/// The largest request of health and reflection, in bytes: the name of a service or a type.
/// Anybody may keep such a stream open.
const MAX_OPEN_REQUEST_BYTES: usize = 4 * 1024;

/// Calls of health that one peer may have under way at once, streams included: more than
/// probes and balancers have. With the largest metadata, they take 17 MiB.
const MAX_HEALTH_CALLS_PER_PEER: usize = 256;

/// How long the stop waits for connections on which no call is under way to say goodbye.
/// One that never said anything, or a client that is gone, does not hold it longer.
const GOODBYE: Duration = Duration::from_millis(300);

/// The pause before the start is begun anew because the database went away in its midst.
const PREPARE_RETRY_AFTER: Duration = Duration::from_millis(500);

/// What the service stands on.
#[derive(Clone)]
pub struct Backing {
    /// Where its data is.
    pub database: PgConnectOptions,
    /// What it signs with.
    pub keyring: Keyring,
}

/// The options would show a password.
impl fmt::Debug for Backing {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Backing").finish_non_exhaustive()
    }
}

/// A server that accepts connections: health and reflection answer, the services of the
/// contract do as soon as [`Server::run`] has reached their database.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    gateway: Arc<Gateway>,
    reporter: Reporter,
    metrics: Arc<Metrics>,
    traces: Traces,
    metrics_address: Option<SocketAddr>,
    connections: JoinHandle<()>,
    /// Cancelled when no more connections are accepted.
    closing: CancellationToken,
    /// Cancelled when what is left of them is cut.
    cutting: CancellationToken,
}

impl Server {
    /// Begins to accept connections.
    pub async fn start(listener: TcpListener, config: &Config) -> Result<Self, BoxError> {
        let address = listener.local_addr()?;
        let limits = config.connection_limits();
        limits.allow_files();
        let methods = Methods::of_contract().map_err(Error::into_cause)?;
        let metrics = Arc::new(Metrics::new(methods.paths(), telemetry::lost_lines));
        let (reporter, health) = Reporter::new(&READINESS, metrics.database_up.clone()).await;
        let mut open = Routes::new(health.max_decoding_message_size(MAX_OPEN_REQUEST_BYTES));
        if config.reflection {
            let (v1, v1alpha) = (reflection().build_v1()?, reflection().build_v1alpha()?);
            open = open
                .add_service(v1.max_decoding_message_size(MAX_OPEN_REQUEST_BYTES))
                .add_service(v1alpha.max_decoding_message_size(MAX_OPEN_REQUEST_BYTES));
        }
        let (closing, cutting) = (CancellationToken::new(), CancellationToken::new());
        let max_calls = usize::from(config.max_concurrent_calls);
        let proxies = config.trusted_proxies.clone();
        let peers = Peers::new(peers::Limits {
            connections: config.max_connections_per_peer as usize,
            calls: calls_per_peer(max_calls),
            health_calls: MAX_HEALTH_CALLS_PER_PEER,
            large_answers: LARGE_ANSWERS_PER_PEER,
        });
        let traces = Traces::start(collector(config)?)?;
        let gateway = Gateway::new(
            methods,
            open,
            max_calls,
            peers.clone(),
            proxies,
            metrics.clone(),
            traces.clone(),
        );
        let gateway = Arc::new(gateway);
        let tls = config.tls()?.map(Arc::new);
        if let Some(tls) = tls.clone() {
            tokio::spawn(closing.clone().run_until_cancelled_owned(tls.follow()));
        }
        // Until the very end: the stop is to be seen, too.
        let told = MetricsServer { metrics: metrics.clone(), reporter: reporter.clone() };
        let metrics_address = serve_metrics(config, told, cutting.clone()).await?;
        let count = metrics.connections.clone();
        let acceptor = Acceptor::new(
            gateway.clone(),
            peers,
            limits,
            tls,
            count,
            closing.clone(),
            cutting.clone(),
        );
        let connections = tokio::spawn(acceptor.run(listener));
        Ok(Self {
            address,
            gateway,
            reporter,
            metrics,
            traces,
            metrics_address,
            connections,
            closing,
            cutting,
        })
    }

    /// Where metrics are served, if they are.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Serves until `shutdown` is cancelled. Calls `announce` when the database is reached
    /// and migrated. Errors come before that only.
    pub async fn run(
        self,
        config: &Config,
        backing: Backing,
        announce: impl FnOnce(SocketAddr),
        shutdown: CancellationToken,
    ) -> Result<(), BoxError> {
        let prepared = tokio::select! {
            prepared = prepare(config, &backing.database) => {
                Some(prepared.map_err(Error::into_cause)?)
            }
            () = shutdown.cancelled() => None,
        };
        if let Some(database) = prepared {
            self.gateway.serve(api(config, database.clone(), &backing.keyring, &self.metrics));
            self.reporter.report(true).await;
            let follow = tokio::spawn(self.reporter.clone().follow(HealthCheck::new(database)));
            tracing::info!(address = %self.address, "serving");
            announce(self.address);
            shutdown.cancelled().await;
            follow.abort();
            // It must not say SERVING after what is said next.
            let _ = follow.await;
        }
        self.stop(config.shutdown_delay(), config.shutdown_grace()).await;
        Ok(())
    }

    /// Says that it is going, waits for `delay` until that is known, and lets the calls
    /// under way finish, and the collector take their traces, for `grace` at the most.
    async fn stop(self, delay: Duration, grace: Duration) {
        self.reporter.report(false).await;
        tokio::time::sleep(delay).await;
        self.closing.cancel();
        let end = Instant::now() + grace;
        let calls_end = async {
            self.gateway.calls_end().await;
            tokio::time::sleep(GOODBYE).await;
        };
        let ended = async {
            tokio::select! {
                // It does not panic, and nobody aborts it.
                _ = self.connections => {}
                () = calls_end => {}
            }
        };
        if timeout_at(end, ended).await.is_err() {
            tracing::warn!("calls were cut: they did not end within the grace");
        }
        self.cutting.cancel();
        self.traces.stop(end.saturating_duration_since(Instant::now())).await;
        tracing::info!("stopped");
    }
}

/// Waits for the database and brings it into the state that the services need. Begins
/// anew when the database goes away meanwhile.
async fn prepare(config: &Config, options: &PgConnectOptions) -> Result<Database, Error> {
    let give_up_at = Instant::now() + config.database_wait();
    loop {
        match prepare_once(config, options, give_up_at).await {
            Err(Error::DatabaseUnavailable(cause)) if Instant::now() < give_up_at => {
                tracing::warn!(cause = %ErrorChain(&*cause), "the database went away, beginning anew");
                tokio::time::sleep(PREPARE_RETRY_AFTER).await;
            }
            result => return result,
        }
    }
}

async fn prepare_once(
    config: &Config,
    options: &PgConnectOptions,
    give_up_at: Instant,
) -> Result<Database, Error> {
    let patience = || give_up_at.saturating_duration_since(Instant::now());
    let mut connection = database::reach(options, patience()).await?;
    if config.migrate_on_start {
        database::migrate(options, patience()).await?;
    } else {
        database::wait_for_schema(&mut connection, patience()).await?;
    }
    let database = Database::new(options.clone(), config.database_max_connections.into())?;
    database.warm_up().await?;
    Ok(database)
}

/// Connects to the collector of traces when there is something to export.
fn collector(config: &Config) -> Result<Option<Channel>, BoxError> {
    let Some(uri) = &config.otel_exporter_otlp_endpoint else {
        return Ok(None);
    };
    let endpoint = traces::endpoint(uri);
    Ok(Some(if uri.scheme() == Some(&Scheme::HTTPS) {
        endpoint.connect_with_connector_lazy(tls::connector(tls::public_client()?))
    } else {
        endpoint.connect_lazy()
    }))
}

/// Serves metrics until `cutting`, if that is wanted. Where they are then.
async fn serve_metrics(
    config: &Config,
    server: MetricsServer,
    cutting: CancellationToken,
) -> Result<Option<SocketAddr>, BoxError> {
    let Some(address) = config.metrics()? else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address).await;
    let listener =
        listener.map_err(|error| format!("cannot listen on {address} (METRICS_ADDR): {error}"))?;
    let address = listener.local_addr()?;
    tokio::spawn(cutting.run_until_cancelled_owned(server.run(listener)));
    tracing::info!(%address, "metrics are served");
    Ok(Some(address))
}

fn api(config: &Config, database: Database, keyring: &Keyring, metrics: &Metrics) -> Api {
    let live_sessions = Arc::new(LiveSessions::new(metrics.session_checks.clone()));
    let together = config.coalescing;
    let attempts = Arc::new(Attempts::default());
    let hasher = Hasher::new(config.hashing_threads.into(), config.hashing_cost.clone());
    metrics.set_sources(ScrapeSources {
        connections: Box::new({
            let database = database.clone();
            move || database.connections()
        }),
        hashing_jobs: Box::new({
            let hasher = hasher.clone();
            move || hasher.queue_length()
        }),
        cached_users: Box::new({
            let live_sessions = live_sessions.clone();
            move || live_sessions.users()
        }),
    });
    let page_tokens = PageTokens::new(keyring);
    let access_tokens = AccessTokens::new(
        keyring,
        &config.token_issuer,
        &config.token_audience,
        time::Duration::minutes(config.access_token_expire_minutes.into()),
    );
    let authenticator = Arc::new(Authenticator {
        access_tokens,
        live_sessions: live_sessions.clone(),
        find_expiry: Coalescer::new(database.clone(), together, DEFAULT_DEADLINE),
    });
    let auth = AuthService {
        database: database.clone(),
        hasher: hasher.clone(),
        attempts,
        authenticator: authenticator.clone(),
        refresh_tokens: RefreshTokens::new(keyring),
        logins_failed: metrics.logins_failed.clone(),
        session_lifetime: time::Duration::days(config.refresh_token_expire_days.into()),
    };
    let user = UserService {
        database: database.clone(),
        find: Coalescer::new(database.clone(), together, DEFAULT_DEADLINE),
        hasher,
        sign_ups: SignUps::new(config.sign_ups_per_peer_per_minute),
        live_sessions,
        page_tokens: page_tokens.clone(),
    };
    let todo = TodoService {
        find: Coalescer::new(database.clone(), together, DEFAULT_DEADLINE),
        list: Coalescer::new(database.clone(), together, DEFAULT_DEADLINE),
        insert: Coalescer::new(database.clone(), together, DEFAULT_DEADLINE),
        database,
        page_tokens,
    };
    let routes =
        Routes::new(AuthServiceServer::new(auth).max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_service(UserServiceServer::new(user).max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_service(TodoServiceServer::new(todo).max_decoding_message_size(MAX_REQUEST_BYTES))
            .prepare();
    Api { authenticator, routes }
}

/// Both versions list all services, themselves and each other included, and know the
/// types of error details, so that clients without them can show them.
fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .include_reflection_service(false)
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
}
