//! The composition root: wires the parts, starts and stops them. It contains no business logic.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::uri::Scheme;
use sqlx::postgres::PgConnectOptions;
use tokio::{
    net::TcpListener,
    task::JoinHandle,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{server::NamedService, service::Routes, transport::Channel};
use tonic_health::pb::health_server::{Health, HealthServer};

use crate::{
    auth::{
        AccessTokens, RefreshTokens,
        service::{AuthParts, AuthService},
    },
    config::{Config, ConfigError},
    crypto::{hashing::HashingPool, keys::Keyring},
    database::{Database, HealthCheck, connect, migrate},
    limits::{
        MAX_CALL_TIMEOUT, MAX_REQUEST_BYTES, MAX_SYSTEM_REQUEST_BYTES,
        admission::{Admission, client_limits},
        client_quota::ClientQuotas,
    },
    middleware::{self, ApiRoutes, Context},
    rpc::{
        error::Error,
        page_token::PageTokenCodec,
        policy::MethodTable,
        proto::{
            FILE_DESCRIPTOR_SET, auth::v1::auth_service_server::AuthServiceServer,
            todo::v1::todo_service_server::TodoServiceServer,
            user::v1::user_service_server::UserServiceServer,
        },
        reflection,
    },
    telemetry::{
        admin::{AdminServer, KeySetSource},
        health::ReadinessReporter,
        log,
        metrics::{Metrics, ScrapeSources},
        traces::{self, CallTracer},
    },
    todo::{
        changes::{cursor::CursorCodec, hub::WatchHub, service::ChangeService},
        service::TodoService,
        store::TodoStore,
        sweep::TrashSweeper,
    },
    transport::{accept::Acceptor, failures::FailureLog, tls},
    types::error_chain::{BoxError, ErrorChain},
    user::{service::UserService, sign_up_limit::SignUpLimiter, store::UserStore},
};

/// The health names that need the database. The empty one is the server as a whole.
const READINESS_SERVICES: [&str; 4] = [
    "",
    <AuthServiceServer<AuthService> as NamedService>::NAME,
    <TodoServiceServer<TodoService> as NamedService>::NAME,
    <UserServiceServer<UserService> as NamedService>::NAME,
];

/// How long a shutdown waits for connections without calls to acknowledge GOAWAY. A client that
/// never sent anything, or is gone, does not delay it for longer.
///
/// Test: `idle_connections_do_not_delay_the_shutdown`.
const GOAWAY_TIMEOUT: Duration = Duration::from_millis(300);

/// The pause before the startup is repeated because the connection to the database was lost.
const STARTUP_RETRY_DELAY: Duration = Duration::from_millis(500);

/// A server that accepts connections: health and reflection answer at once, the API as soon as
/// [`Server::run`] has reached the database.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    admin_address: Option<SocketAddr>,
    tls: bool,
    context: Arc<Context>,
    readiness: ReadinessReporter,
    key_set: KeySetSource,
    connections: JoinHandle<()>,
    /// Cancelled when the server stops accepting and drains its connections.
    drain: CancellationToken,
    /// Cancelled when the server closes what is left.
    force_close: CancellationToken,
}

impl Server {
    /// Starts to accept connections.
    ///
    /// # Errors
    /// If a certificate cannot be used, or the admin server cannot listen.
    pub async fn start(listener: TcpListener, config: &Config) -> Result<Self, BoxError> {
        let address = listener.local_addr()?;
        let limits = config.limits.connections();
        limits.raise_fd_limit();
        let methods = MethodTable::new()?;
        let metrics = Arc::new(Metrics::new(methods.iter().map(|it| it.path), log::dropped_lines));
        let (readiness, health) =
            ReadinessReporter::new(&READINESS_SERVICES, metrics.database_up.clone());
        let max_calls = usize::from(config.limits.max_concurrent_calls);
        let max_connections = config.limits.max_connections_per_peer as usize;
        let max_streams = config.limits.max_watches_per_peer as usize;
        let quotas = ClientQuotas::new(client_limits(max_calls, max_connections, max_streams));
        let context = Arc::new(Context {
            methods,
            metrics: metrics.clone(),
            tracer: CallTracer::new(collector_channel(config)?)?,
            admission: Admission::new(max_calls, config.limits.max_watches as usize),
            quotas: quotas.clone(),
            trusted_proxies: config.listen.trusted_proxies.clone(),
            calls: <_>::default(),
            system: system_routes(health, config.listen.reflection)?.prepare(),
            api: <_>::default(),
        });
        let (drain, force_close) = (CancellationToken::new(), CancellationToken::new());
        let tls = config.tls.load()?.map(Arc::new);
        if let Some(tls) = tls.clone() {
            tokio::spawn(drain.clone().run_until_cancelled_owned(tls.watch()));
        }
        // Until the very end, so that a shutdown can be observed.
        let key_set = KeySetSource::default();
        let admin = AdminServer {
            metrics: metrics.clone(),
            readiness: readiness.clone(),
            key_set: key_set.clone(),
        };
        let admin_address = serve_admin(config, admin, force_close.clone()).await?;
        let has_tls = tls.is_some();
        let acceptor = Acceptor {
            service: middleware::stack(&context),
            limits,
            tls,
            quotas,
            trusted_proxies: config.listen.trusted_proxies.clone(),
            open_connections: metrics.connections.clone(),
            failures: Arc::new(FailureLog::new(|reason| metrics.connection_failures(reason))),
            drain: drain.clone(),
            force_close: force_close.clone(),
        };
        let connections = tokio::spawn(acceptor.run(listener));
        Ok(Self {
            address,
            admin_address,
            tls: has_tls,
            context,
            readiness,
            key_set,
            connections,
            drain,
            force_close,
        })
    }

    /// Returns the address of the admin server, if there is one.
    #[must_use]
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Serves until `shutdown` is cancelled, and then drains. Calls `on_ready` with the address
    /// when the API is served.
    ///
    /// # Errors
    /// If the database or the keys are not set or cannot be used. It returns errors only before
    /// `on_ready`.
    pub async fn run(
        self,
        config: &Config,
        on_ready: impl FnOnce(SocketAddr),
        shutdown: CancellationToken,
    ) -> Result<(), BoxError> {
        let options = config.database.required_options()?;
        let keyring = config.tokens.keyring()?;
        let keyring = keyring.ok_or_else(|| ConfigError::missing("SECRET_KEY"))?;
        let prepared = tokio::select! {
            prepared = prepare_database(config, &options) => {
                Some(prepared.map_err(Error::into_source)?)
            }
            () = shutdown.cancelled() => None,
        };
        if let Some(database) = prepared {
            let metrics = &self.context.metrics;
            let api = build_api(config, &database, &keyring, metrics);
            let authenticator = api.authenticator.clone();
            self.key_set.set(move || authenticator.jwk_set());
            self.context.mount_api(api);
            self.readiness.set_ready(true);
            let sweeper = TrashSweeper {
                database: database.clone(),
                purged: metrics.todos_purged.clone(),
                removed: metrics.tombstones_removed.clone(),
            };
            let sweep = tokio::spawn(sweeper.run());
            let check = HealthCheck::new(database);
            let watch = tokio::spawn(self.readiness.clone().watch_database(check));
            let admin_address = self.admin_address.map(tracing::field::display);
            tracing::info!(address = %self.address, admin_address, tls = self.tls, "serving");
            on_ready(self.address);
            shutdown.cancelled().await;
            sweep.abort();
            watch.abort();
            // Otherwise it could set SERVING after the shutdown sets NOT_SERVING.
            let _ = watch.await;
        }
        let lifecycle = &config.lifecycle;
        self.shut_down(lifecycle.shutdown_delay(), lifecycle.shutdown_grace()).await;
        Ok(())
    }

    /// Sets NOT_SERVING, serves on for `delay`, until load balancers have seen it, and then gives
    /// the calls in flight, and the collector of traces, `grace` to finish.
    async fn shut_down(self, delay: Duration, grace: Duration) {
        self.readiness.set_ready(false);
        sleep(delay).await;
        self.drain.cancel();
        let deadline = Instant::now() + grace;
        let calls_drained = async {
            self.context.drain().await;
            sleep(GOAWAY_TIMEOUT).await;
        };
        let drained = async {
            tokio::select! {
                // The task does not panic, and no one aborts it.
                _ = self.connections => {}
                () = calls_drained => {}
            }
        };
        if timeout_at(deadline, drained).await.is_err() {
            tracing::warn!("grace period expired, aborting in-flight calls");
        }
        self.force_close.cancel();
        let rest = deadline.saturating_duration_since(Instant::now());
        self.context.tracer.clone().shut_down(rest).await;
        tracing::info!("stopped");
    }
}

/// Waits for the database and brings it into the state that the services need. Starts over when
/// the connection is lost.
async fn prepare_database(config: &Config, options: &PgConnectOptions) -> Result<Database, Error> {
    let deadline = Instant::now() + config.database.wait();
    loop {
        match try_prepare_database(config, options, deadline).await {
            Err(Error::DatabaseUnavailable(error)) if Instant::now() < deadline => {
                tracing::warn!(
                    error = %ErrorChain(&*error),
                    "database connection lost during startup, retrying"
                );
                sleep(STARTUP_RETRY_DELAY).await;
            }
            result => return result,
        }
    }
}

async fn try_prepare_database(
    config: &Config,
    options: &PgConnectOptions,
    deadline: Instant,
) -> Result<Database, Error> {
    let timeout = || deadline.saturating_duration_since(Instant::now());
    let mut connection = connect::connect_and_check(options, timeout()).await?;
    if config.lifecycle.migrate_on_start {
        migrate::migrate(options, timeout()).await?;
    } else {
        migrate::wait_for_schema(&mut connection, timeout()).await?;
    }
    let max_connections = config.limits.database_max_connections.into();
    let database = Database::new(options.clone(), max_connections)?;
    database.warm_up().await?;
    database.check_privileges().await?;
    Ok(database)
}

/// Serves the admin server until `stop`, if it is configured. Returns its address.
async fn serve_admin(
    config: &Config,
    server: AdminServer,
    stop: CancellationToken,
) -> Result<Option<SocketAddr>, BoxError> {
    let Some(address) = config.listen.checked_metrics_addr()? else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address).await;
    let listener =
        listener.map_err(|error| format!("cannot listen on METRICS_ADDR {address}: {error}"))?;
    let address = listener.local_addr()?;
    tokio::spawn(stop.run_until_cancelled_owned(server.run(listener)));
    tracing::info!(%address, "serving metrics");
    Ok(Some(address))
}

/// Returns a channel to the collector of traces, which connects when there are spans to export.
fn collector_channel(config: &Config) -> Result<Option<Channel>, BoxError> {
    let Some(uri) = &config.listen.otel_exporter_otlp_endpoint else {
        return Ok(None);
    };
    let endpoint = traces::collector_endpoint(uri);
    Ok(Some(if uri.scheme() == Some(&Scheme::HTTPS) {
        endpoint.connect_with_connector_lazy(tls::connector(tls::webpki_client_config()?))
    } else {
        endpoint.connect_lazy()
    }))
}

/// Returns the routes that need no database.
///
/// Reflection lists all services, and knows the types of error details, so that clients without
/// them can show them.
fn system_routes(
    health: HealthServer<impl Health>,
    with_reflection: bool,
) -> Result<Routes, BoxError> {
    let routes = Routes::new(health.max_decoding_message_size(MAX_SYSTEM_REQUEST_BYTES));
    if !with_reflection {
        return Ok(routes);
    }
    let descriptors = [
        FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_types::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let (v1, v1alpha) = reflection::services(&descriptors, MAX_SYSTEM_REQUEST_BYTES)?;
    Ok(routes.add_service(v1).add_service(v1alpha))
}

/// Wires the services of the API.
fn build_api(
    config: &Config,
    database: &Database,
    keyring: &Keyring,
    metrics: &Metrics,
) -> ApiRoutes {
    let (tokens, batching) = (&config.tokens, config.limits.coalescing);
    let passwords = HashingPool::new(config.limits.hashing_threads(), tokens.argon2_params.clone());
    let page_tokens = PageTokenCodec::new(keyring);
    let auth = AuthService::new(AuthParts {
        database: database.clone(),
        batching,
        query_deadline: MAX_CALL_TIMEOUT,
        access_tokens: AccessTokens::new(keyring.clone(), tokens.access_tokens()),
        refresh_tokens: RefreshTokens::new(keyring),
        session_lifetime: time::Duration::days(tokens.refresh_token_expire_days.into()),
        passwords: passwords.clone(),
        password_failures: metrics.password_failures.clone(),
        session_cache: metrics.session_cache.clone(),
    });
    let (authenticator, sessions) = (auth.authenticator(), auth.sessions());
    metrics.set_sources(ScrapeSources {
        pool_status: Box::new({
            let database = database.clone();
            move || database.pool_status()
        }),
        hashing_jobs: Box::new({
            let passwords = passwords.clone();
            move || passwords.queue_len()
        }),
        cached_users: Box::new({
            let sessions = sessions.clone();
            move || sessions.cached_users()
        }),
    });
    let user = UserService {
        store: UserStore::new(database.clone(), batching, MAX_CALL_TIMEOUT),
        passwords,
        sign_ups: SignUpLimiter::new(config.limits.sign_ups_per_peer_per_minute),
        invalidate_sessions: Arc::new(move |user_id| sessions.invalidate(user_id)),
        page_tokens: page_tokens.clone(),
    };
    let watches = WatchHub::new(config.limits.max_watches_per_user.into(), metrics.watches.clone());
    let todo = TodoService {
        store: TodoStore::new(database.clone(), watches.clone(), batching, MAX_CALL_TIMEOUT),
        page_tokens,
        changes: ChangeService::new(database.clone(), CursorCodec::new(keyring), watches),
    };
    let routes =
        Routes::new(AuthServiceServer::new(auth).max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_service(UserServiceServer::new(user).max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_service(TodoServiceServer::new(todo).max_decoding_message_size(MAX_REQUEST_BYTES));
    #[cfg(feature = "test-service")]
    let routes = routes.add_service(crate::rpc::test_service::server());
    ApiRoutes { authenticator, routes: routes.prepare() }
}
