//! The life cycle of the binary, from startup to exit.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use fast_zero::proto::{
    auth::v1::CreatePersonalAccessTokenRequest,
    user::v1::{CreateUserRequest, GetUserRequest},
};
use nix::sys::signal::Signal;
use sqlx::ConnectOptions;
use tonic::Code;

use crate::support::{
    App, Client, PASSWORD,
    app::{self, config, connect},
    assert::{assert_status, assert_unauthenticated},
    metrics::Scrape,
    personal_access_tokens::new_token,
    postgres::TestDatabase,
    process::{Binary, Process},
    proxy::{self, Proxy},
    readme::OBSERVABILITY,
    row_lock::RowLock,
    wait::wait_until,
};

async fn healthcheck(address: &str, service: &str) -> Option<i32> {
    Binary::new(&["healthcheck", "--addr", address, "--service", service]).output().await.0
}

async fn client(process: &Process) -> Client {
    let address = process.address().await.parse().expect("an address");
    Client::new(connect(address).await)
}

#[tokio::test]
async fn the_server_serves_until_a_signal() {
    let database = TestDatabase::create().await;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = Binary::server(&database.url()).start();
        let address = server.address().await;
        assert_eq!(healthcheck(&address, "").await, Some(0));
        assert_eq!(healthcheck(&address, "fastzero.todo.v1.TodoService").await, Some(0));
        assert_eq!(healthcheck(&address, "no.such.Service").await, Some(3));
        server.signal(signal);
        assert_eq!(server.wait().await.code(), Some(0), "{signal}");
        assert_eq!(healthcheck(&address, "").await, Some(2));
    }
}

#[tokio::test]
async fn the_healthcheck_checks_the_server_of_its_settings() {
    let database = TestDatabase::create().await;
    let address = Proxy::reserve_address().await;
    let everywhere = format!("0.0.0.0:{}", address.port());
    let server = Binary::server(&database.url()).env("LISTEN_ADDR", &everywhere).start();
    server.address().await;
    let check = Binary::new(&["healthcheck"]).env("LISTEN_ADDR", &everywhere);
    assert_eq!(check.output().await.0, Some(0));
}

#[tokio::test]
async fn the_healthcheck_of_all_addresses_works_where_ipv6_is_disabled() {
    let database = TestDatabase::create().await;
    // As with IPv6 disabled, no server has this port of ::1.
    let address = Proxy::reserve_address().await;
    let everywhere = format!("[::]:{}", address.port());
    let check = || Binary::new(&["healthcheck"]).env("LISTEN_ADDR", &everywhere).output();
    let (code, output) = check().await;
    assert_eq!(code, Some(2), "{output}");
    for part in [&*format!("[::1]:{}: cannot connect", address.port()), "pass --addr"] {
        assert!(output.contains(part), "{part} is not in: {output}");
    }
    let server = Binary::server(&database.url()).env("LISTEN_ADDR", &address.to_string()).start();
    server.address().await;
    assert_eq!(check().await, (Some(0), String::new()));
}

#[tokio::test]
async fn the_healthcheck_reads_only_the_settings_that_it_needs() {
    let address = Proxy::reserve_address().await.to_string();
    let check = Binary::new(&["healthcheck", "--addr", &address]);
    let (code, output) = check.env("TRUSTED_PROXIES", "no network").output().await;
    assert_eq!(code, Some(2), "{output}");

    let (code, help) = Binary::new(&["healthcheck", "--help"]).output().await;
    assert_eq!(code, Some(0));
    assert!(help.contains("LISTEN_ADDR") && help.contains("TLS_CERT_FILE"), "{help}");
    for variable in ["METRICS_ADDR", "OTEL_EXPORTER_OTLP_ENDPOINT", "REFLECTION", "TRUSTED_PROXIES"]
    {
        assert!(!help.contains(variable), "{variable} is in:\n{help}");
    }
}

#[tokio::test]
async fn the_healthcheck_of_a_silent_server_ends_after_a_second() {
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address").to_string();
    let started = Instant::now();
    assert_eq!(healthcheck(&address, "").await, Some(3));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_server_waits_for_its_database_and_is_not_serving_until_then() {
    let database = TestDatabase::create().await;
    let proxy_address = Proxy::reserve_address().await;
    let url = proxy::options_via(proxy_address, &database.options).to_url_lossy();
    let address = Proxy::reserve_address().await.to_string();
    let server = Binary::server(url.as_str()).env("LISTEN_ADDR", &address).start();

    server.wait_for_line("waiting for the database").await;
    assert_eq!(healthcheck(&address, "").await, Some(4));
    assert_eq!(healthcheck(&address, "liveness").await, Some(0));
    let early = Client::new(connect(address.parse().expect("an address")).await);
    let request = GetUserRequest { id: "me".into() };
    let rejected = early.users().get_user(request).await;
    assert_status(rejected, Code::Unavailable, "DATABASE_UNAVAILABLE");

    let _open = Proxy::open(proxy_address, &database.options).await;
    server.address().await;
    assert_eq!(healthcheck(&address, "").await, Some(0));
}

#[tokio::test]
async fn the_wait_for_the_database_times_out() {
    let nothing = format!("postgres://ana:hidden-password@{}/db", Proxy::reserve_address().await);
    let server = Binary::server(&nothing).env("DATABASE_WAIT_SECONDS", "1");
    let started = Instant::now();
    let (code, output) = server.output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(output.contains("waiting for the database"), "{output}");
    assert!(output.lines().last().is_some_and(|line| line.starts_with("error: ")), "{output}");
    assert!(!output.contains("hidden-password"), "{output}");
}

#[tokio::test]
async fn a_permanent_database_error_fails_startup_immediately() {
    let database = TestDatabase::create().await;
    let missing = database.options.clone().database("no_such_database").to_url_lossy();
    let (code, output) = Binary::server(missing.as_str()).output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("no_such_database"), "{output}");
}

#[tokio::test]
async fn a_failed_migration_fails_startup() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let mut sql = database.connect().await;
    sqlx::raw_sql("create table todos (id int)").execute(&mut sql).await.expect("created");
    let (code, output) = Binary::server(&database.url()).output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains("todos"), "{output}");
    assert!(!output.contains("\"serving\""), "{output}");
}

#[tokio::test]
async fn concurrently_started_replicas_migrate_once() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let servers: Vec<_> = (0..3).map(|_| Binary::server(&database.url()).start()).collect();
    for server in &servers {
        let address = server.address().await;
        assert_eq!(healthcheck(&address, "").await, Some(0));
    }
    let mut sql = database.connect().await;
    let count = sqlx::query_scalar::<_, i64>("select count(*) from _sqlx_migrations");
    let count = count.fetch_one(&mut sql).await.expect("counted");
    assert_eq!(usize::try_from(count), Ok(crate::support::postgres::MIGRATIONS.iter().count()));
}

#[tokio::test]
async fn the_server_waits_for_a_separate_migration() {
    let database = TestDatabase::create_empty("template template0 encoding 'UTF8'").await;
    let server = Binary::server(&database.url()).env("MIGRATE_ON_START", "false").start();
    server.wait_for_line("waiting for schema migration").await;
    let migrate = Binary::new(&["migrate"])
        .env("DATABASE_URL", &database.url())
        .env("SECRET_KEY", app::SECRET_KEY);
    let (code, output) = migrate.output().await;
    assert_eq!(code, Some(0), "{output}");
    let address = server.address().await;
    assert_eq!(healthcheck(&address, "").await, Some(0));
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let address = server.address().await;
    let (code, output) =
        Binary::server(&database.url()).env("LISTEN_ADDR", &address).output().await;
    assert_eq!(code, Some(1), "{output}");
    assert!(output.contains(&address), "{output}");
}

#[tokio::test]
async fn a_second_signal_stops_the_server_immediately() {
    let database = TestDatabase::create().await;
    let mut server = Binary::server(&database.url()).start();
    let ana = client(&server).await.signed_up("ana").await;
    let todo = ana.create_todo("held").await;
    let mut lock = RowLock::acquire(database.connect().await, "lock todos").await;
    let _held = tokio::spawn(async move { ana.try_delete_todo(&todo.id, "").await });
    lock.wait_until_blocking().await;
    assert_second_signal_stops(&mut server).await;

    // During the shutdown delay.
    let mut server = Binary::server(&database.url()).env("SHUTDOWN_DELAY_SECONDS", "3600").start();
    server.address().await;
    assert_second_signal_stops(&mut server).await;

    // During the wait for the database.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("postgresql://{}/none", silent.local_addr().expect("an address"));
    let mut server = Binary::server(&url).env("SHUTDOWN_DELAY_SECONDS", "3600").start();
    server.wait_for_line("waiting for the database").await;
    assert_second_signal_stops(&mut server).await;
}

/// Asserts that the server exits after the second signal, and not after the first.
async fn assert_second_signal_stops(server: &mut Process) {
    server.signal(Signal::SIGTERM);
    server.wait_for_line("shutting down").await;
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().await.code(), Some(1));
}

#[tokio::test]
async fn the_log_has_a_line_for_each_call_and_no_secret() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).env("RUST_LOG", "debug").start();
    let anonymous = client(&server).await;
    let request = CreateUserRequest {
        username: "ana".into(),
        email: "ana@example.com".into(),
        password: PASSWORD.into(),
    };
    let signing_up = anonymous.clone().with_metadata("x-request-id", "sign-up-1");
    signing_up.users().create_user(request.clone()).await.expect("signed up");
    let taken = anonymous
        .clone()
        .with_metadata("x-request-id", "sign-up-2")
        .users()
        .create_user(request)
        .await;
    assert_status(taken, Code::AlreadyExists, "USERNAME_EXISTS");
    let ana = anonymous.logged_in("ana@example.com", PASSWORD).await.expect("logged in");
    let me = ana.clone().with_metadata("x-request-id", "me-1").users();
    let request = GetUserRequest { id: "me".into() };
    let user = me.clone().get_user(request).await.expect("a response").into_inner().user;
    let (created, secret) = ana.create_token(&["user.read"]).await;
    let job = ana.clone().with_token(&secret).with_metadata("x-request-id", "job-1");
    job.get_user("me").await;
    let job = ana.clone().with_token(&secret).with_metadata("x-request-id", "job-2");
    ana.introspect(&secret).await;
    ana.try_revoke_token(&created.id).await.expect("revoked");
    assert_unauthenticated(job.try_get_user("me").await, "TOKEN_INVALID");

    // The shutdown line follows all earlier lines.
    server.signal(Signal::SIGTERM);
    server.wait_for_line("\"message\":\"stopped\"").await;
    let output = server.output();
    let user_id = format!("\"user_id\":\"{}\"", user.expect("a user").id);
    let session_id = format!("\"session_id\":\"{}\"", ana.tokens().session_id);
    let token_id = format!("\"personal_access_token_id\":\"{}\"", created.id);
    for (id, code, caller) in [
        ("sign-up-1", "OK", &[][..]),
        ("sign-up-2", "ALREADY_EXISTS", &[]),
        ("me-1", "OK", &[&*user_id, &session_id]),
        ("job-1", "OK", &[&*user_id, &token_id]),
        ("job-2", "UNAUTHENTICATED", &[]),
    ] {
        let is_call = |line: &&str| line.contains(id) && line.contains("\"message\":\"call\"");
        let lines: Vec<_> = output.lines().filter(is_call).collect();
        assert_eq!(lines.len(), 1, "{id}: {output}");
        let code = format!("\"code\":\"{code}\"");
        let parts = ["\"method\":", "\"duration_ms\":", "\"client_ip\":\"127.0.0.1\"", &*code];
        for part in parts.iter().chain(caller) {
            assert!(lines[0].contains(part), "{part} is not in {}", lines[0]);
        }
    }
    let tokens = ana.tokens();
    for secret in [
        PASSWORD,
        "ana@example.com",
        &tokens.access_token,
        &tokens.refresh_token,
        &secret,
        // The part in which the random bytes are.
        &secret[50..85],
        app::SECRET_KEY,
        "argon2id",
    ] {
        assert!(!output.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test]
async fn calls_do_not_wait_for_an_unread_log() {
    let database = TestDatabase::create().await;
    let (address, metrics) = (Proxy::reserve_address().await, Proxy::reserve_address().await);
    let (_unread, log) = std::io::pipe().expect("a pipe");
    let _server = Binary::server(&database.url())
        .env("LISTEN_ADDR", &address.to_string())
        .env("METRICS_ADDR", &metrics.to_string())
        .env("RUST_LOG", "trace")
        .log_to(log)
        .start();
    let address_text = address.to_string();
    wait_until("the server serves", async || healthcheck(&address_text, "").await == Some(0)).await;
    let caller = Client::new(connect(address).await);
    // More lines than fit into the pipe and the buffer.
    wait_until("lines are dropped", async || {
        caller.users().get_user(GetUserRequest::default()).await.expect_err("without a token");
        Scrape::fetch(metrics).await.get("fastzero_log_lines_dropped_total") > Some(0.0)
    })
    .await;
    caller.signed_up("ana").await.create_todo("a").await;
}

#[tokio::test]
async fn the_audit_trail_identifies_users_by_id_only() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let anonymous = client(&server).await;
    let user_id = anonymous.create_user("ana").await.id;
    for login in ["ana", "stranger"] {
        for _ in 0..10 {
            let rejected = anonymous.try_log_in(login, "wrong password").await;
            assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
        }
    }
    // Failures by email are counted separately.
    let login = "ana@example.com";
    let other = anonymous.logged_in(login, PASSWORD).await.expect("logged in");
    let ana = anonymous.logged_in(login, PASSWORD).await.expect("logged in");
    let (session, revoked) = (&ana.tokens().session_id, &other.tokens().session_id);
    ana.try_revoke_session(revoked).await.expect("revoked");
    ana.change_password(PASSWORD, "a new password").await;
    let old = &ana.tokens().refresh_token;
    let second = ana.refresh(old).await;
    let third = ana.refresh(&second.refresh_token).await;
    assert_unauthenticated(ana.try_refresh(old).await, "REFRESH_TOKEN_REUSED");
    let again = anonymous.logged_in(login, "a new password").await.expect("logged in");
    let request = CreatePersonalAccessTokenRequest {
        current_password: "a new password".into(),
        ..new_token(&["user.read"])
    };
    let created = again.try_create_token(request).await.expect("created").into_inner();
    let token = created.personal_access_token.expect("a token").id;
    again.clone().with_token(&created.secret).get_user("me").await;
    again.try_revoke_token(&token).await.expect("revoked");
    again.try_delete_user("me", "").await.expect("deleted");

    server.wait_for_line("user_deleted").await;
    let output = server.output();
    let trail: Vec<_> = output.lines().filter(|line| line.contains("fast_zero::audit")).collect();
    let count = |event: &str, ids: &[&str]| {
        let event = format!("\"event\":\"{event}\"");
        let matches =
            |line: &&&str| line.contains(&event) && ids.iter().all(|id| line.contains(id));
        trail.iter().filter(matches).count()
    };
    for (event, ids, times) in [
        ("sign_up", &[&*user_id][..], 1),
        ("login_failed", &[&*user_id], 10),
        ("login_failed", &[], 20),
        ("login_locked", &[&*user_id], 1),
        ("login_locked", &[], 2),
        ("login", &[&*user_id, &**session], 1),
        ("login", &[&*user_id], 3),
        ("session_revoked", &[&*user_id, &**revoked], 1),
        ("password_changed", &[&*user_id, &**session], 1),
        ("refresh_reused", &[&*user_id, &**session], 1),
        ("personal_access_token_created", &[&*user_id, &*token], 1),
        ("personal_access_token_revoked", &[&*user_id, &*token], 1),
        ("user_deleted", &[&*user_id], 1),
    ] {
        assert_eq!(count(event, ids), times, "{event} {ids:?}:\n{output}");
        assert!(OBSERVABILITY.contains(&format!("| `{event}` |")), "{event} is not documented");
    }
    for line in trail {
        assert!(line.contains("\"client_ip\":\"127.0.0.1\""), "{line}");
        for secret in [
            "\"ana",
            "@example.com",
            "stranger",
            "password\"",
            old,
            &third.refresh_token,
            "fz_",
            "nightly job",
            PASSWORD,
        ] {
            assert!(!line.contains(secret), "{secret} is in {line}");
        }
    }
}

#[tokio::test]
async fn a_database_outage_is_reported_and_recovers() {
    let database = TestDatabase::create().await;
    let proxy_address = Proxy::reserve_address().await;
    let options = proxy::options_via(proxy_address, &database.options);
    let open = Proxy::open(proxy_address, &database.options).await;
    let app = App::start_via(database, options, config()).await;
    let ana = app.signed_up("ana").await;
    let get = async || ana.users().get_user(GetUserRequest { id: "me".into() }).await;
    get().await.expect("a response");

    drop(open);
    let mut health = app.watch("").await;
    health.wait_until_not_serving().await;
    let started = Instant::now();
    assert_status(get().await, Code::Unavailable, "DATABASE_UNAVAILABLE");
    assert!(started.elapsed() < Duration::from_secs(5));

    let _open = Proxy::open(proxy_address, &app.database.options).await;
    health.wait_until_serving().await;
    get().await.expect("a response");
}

#[tokio::test]
async fn a_sign_up_that_its_client_cancels_is_in_the_audit_trail() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let anonymous = client(&server).await;
    let mut lock = RowLock::acquire(database.connect().await, "lock users").await;
    let sign_up = tokio::spawn(async move { anonymous.create_user("ana").await });
    lock.wait_until_blocking().await;
    sign_up.abort();
    server.wait_for_line("CANCELLED").await;
    lock.release().await;
    server.wait_for_line("\"event\":\"sign_up\"").await;
}
