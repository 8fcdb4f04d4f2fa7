//! The login throttle, and the limit of sign-ups.

use std::time::Duration;

use fast_zero::Config;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt;

use crate::support::{
    App, Client, PASSWORD,
    app::{adjusted, config, config_with, connect, unique_name},
    assert::{assert_invalid, assert_status, assert_unauthenticated},
    parallel::join_all,
    postgres::TestDatabase,
    process::Binary,
    statements::statement_count,
    users::own_user,
    wait::wait_until,
};

/// The failures of one client at one account until the first lockout.
const MAX_ACCOUNT_FAILURES: usize = 10;
/// The failures of one client until its lockout.
const MAX_CLIENT_FAILURES: usize = 100;

const WRONG_PASSWORD: &str = "wrong password";
const NEW_PASSWORD: &str = "a new password";

/// Starts a server that trusts `x-forwarded-for`, so that a test can choose client addresses.
async fn start() -> App {
    start_with(config()).await
}

async fn start_with(config: Config) -> App {
    let trusted_proxies = vec!["127.0.0.0/8".parse().expect("a network")];
    App::start_with(adjusted(config, |config| {
        config.listen.trusted_proxies = trusted_proxies;
    }))
    .await
}

trait ClientAt {
    /// Returns a client at this address, without a token.
    fn client_at(&self, address: &str) -> Client;
}

impl ClientAt for App {
    fn client_at(&self, address: &str) -> Client {
        self.anonymous().with_metadata("x-forwarded-for", address)
    }
}

/// Asserts that the throttle rejects the call. Returns the retry delay.
#[track_caller]
fn assert_throttled<T>(result: Result<Response<T>, Status>) -> Duration {
    let rejected = assert_status(result, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    assert_eq!(rejected.message(), "Too many attempts");
    let details = rejected.get_error_details();
    let delay = details.retry_info().and_then(|retry| retry.retry_delay).expect("a delay");
    assert!(!delay.is_zero(), "{rejected:?}");
    delay
}

/// Fails to log in `times` times, each with a password check.
async fn fail(client: &Client, login: &str, times: usize) {
    for _ in 0..times {
        let rejected = client.try_log_in(login, WRONG_PASSWORD).await;
        assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
    }
}

/// Asserts that the account is locked for this client. On a slow machine a lockout of a second
/// may expire; each further failure extends it.
async fn assert_locked(client: &Client, login: &str) {
    for _ in 0..5 {
        match client.try_log_in(login, WRONG_PASSWORD).await {
            Err(rejected) if rejected.code() == Code::Unauthenticated => {}
            response => {
                let delay = assert_throttled(response);
                assert!(delay <= Duration::from_secs(32), "{delay:?}");
                return;
            }
        }
    }
    panic!("{login} is never locked");
}

#[tokio::test]
async fn a_locked_account_rejects_the_correct_password_without_checking_it() {
    let app = start().await;
    app.create_user("ana").await;
    let attacker = app.client_at("192.0.2.1");
    fail(&attacker, "ana", MAX_ACCOUNT_FAILURES).await;
    assert_locked(&attacker, "ANA").await;
    let request_id = unique_name("locked-");
    let right = attacker.clone().with_metadata("x-request-id", &request_id);
    assert_throttled(right.try_log_in("ana", PASSWORD).await);
    assert_eq!(statement_count(&request_id), 0, "no statement");
    wait_until("the lockout expires", async || attacker.try_log_in("ana", PASSWORD).await.is_ok())
        .await;
    fail(&attacker, "ana", MAX_ACCOUNT_FAILURES).await;
}

#[tokio::test]
async fn an_unknown_account_is_locked_like_an_existing_one() {
    let app = start().await;
    app.create_user("ana").await;
    for login in ["ana", "ana@example.com", "stranger", "stranger@example.com", &"x".repeat(1_000)]
    {
        let attacker = app.client_at("192.0.2.1");
        let mut rejections = Vec::new();
        for _ in 0..=MAX_ACCOUNT_FAILURES {
            let Err(rejected) = attacker.try_log_in(login, WRONG_PASSWORD).await else {
                panic!("a wrong password");
            };
            let reason = rejected.get_error_details().error_info().map(|info| info.reason.clone());
            rejections.push((rejected.code(), reason, rejected.message().to_owned()));
        }
        let as_expected =
            |code, reason: &str, message: &str| (code, Some(reason.to_owned()), message.to_owned());
        let mut expected = vec![
            as_expected(
                Code::Unauthenticated,
                "INCORRECT_CREDENTIALS",
                "Incorrect email or password"
            );
            MAX_ACCOUNT_FAILURES
        ];
        expected.push(as_expected(
            Code::ResourceExhausted,
            "TOO_MANY_ATTEMPTS",
            "Too many attempts",
        ));
        assert_eq!(rejections, expected, "{login}");
    }
}

#[tokio::test]
async fn a_lockout_of_an_attacker_affects_neither_the_owner_nor_the_session() {
    let app = start().await;
    app.create_user("ana").await;
    let owner = app.client_at("198.51.100.1");
    let session = owner.logged_in("ana", PASSWORD).await.expect("logged in");
    let attacker = app.client_at("192.0.2.1");
    fail(&attacker, "ana", MAX_ACCOUNT_FAILURES).await;
    assert_locked(&attacker, "ana").await;
    owner.try_log_in("ana", PASSWORD).await.expect("logged in");
    assert!(session.is_session_active().await);
    session.refresh(&session.tokens().refresh_token).await;
    // Not even from the attacker's address.
    assert!(session.with_metadata("x-forwarded-for", "192.0.2.1").is_session_active().await);
}

#[tokio::test]
async fn a_successful_login_resets_the_failure_count() {
    let app = start().await;
    app.create_user("ana").await;
    let owner = app.client_at("192.0.2.1");
    for _ in 0..3 {
        fail(&owner, "ana", MAX_ACCOUNT_FAILURES - 1).await;
        owner.try_log_in("ana", PASSWORD).await.expect("logged in");
    }
}

#[tokio::test]
async fn a_client_that_fails_at_many_accounts_is_locked_out_of_all() {
    let app = start().await;
    app.create_user("ana").await;
    let attacker = app.client_at("2001:db8::1");
    for number in 0..MAX_CLIENT_FAILURES {
        fail(&attacker, &format!("user{number}"), 1).await;
    }
    let neighbor = app.client_at("2001:db8::2");
    for (client, login) in [(&attacker, "ana"), (&attacker, "other"), (&neighbor, "ana")] {
        let delay = assert_throttled(client.try_log_in(login, PASSWORD).await);
        assert!((Duration::from_mins(5)..=Duration::from_mins(10)).contains(&delay), "{delay:?}");
    }
    app.client_at("2001:db8:0:1::1").try_log_in("ana", PASSWORD).await.expect("logged in");
}

#[tokio::test]
async fn concurrent_attempts_are_limited_like_sequential_ones() {
    let app = start().await;
    app.create_user("ana").await;
    let attempts = (0..60).map(|_| {
        let attacker = app.client_at("192.0.2.1");
        async move { attacker.try_log_in("ana", WRONG_PASSWORD).await }
    });
    let (mut checked, mut rejected) = (0, 0);
    for response in join_all(attempts).await {
        if response.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated) {
            checked += 1;
        } else {
            assert_throttled(response);
            rejected += 1;
        }
    }
    assert_eq!((checked, rejected), (MAX_ACCOUNT_FAILURES, 60 - MAX_ACCOUNT_FAILURES));
}

#[tokio::test]
async fn concurrent_logins_with_the_correct_password_all_succeed() {
    let app = start().await;
    app.create_user("ana").await;
    let owner = app.client_at("192.0.2.1");
    fail(&owner, "ana", MAX_ACCOUNT_FAILURES - 1).await;
    let logins = (0..40).map(|_| {
        let owner = owner.clone();
        async move { owner.try_log_in("ana", PASSWORD).await }
    });
    for response in join_all(logins).await {
        response.expect("logged in");
    }
}

#[tokio::test]
async fn a_cancelled_attempt_counts_once_its_hash_has_started() {
    let app = start_with(config_with(|config| {
        config.limits.hashing_threads = 1;
    }))
    .await;
    app.create_user("ana").await;
    app.create_user("slow").await;
    // The hash takes about 100 ms, during which the client cancels the call.
    app.execute(
        "update users set password_hash =
             regexp_replace(password_hash, 'm=\\d+,t=\\d+', 'm=65536,t=2')
         where username = 'slow'",
    )
    .await;
    let attacker = app.client_at("192.0.2.1");
    for number in 1..MAX_CLIENT_FAILURES {
        fail(&attacker, &format!("user{number}"), 1).await;
    }
    // A call that is cancelled before its hash does not count, so retry.
    wait_until("the hundredth failure counts", async || {
        cancel_when_looked_up(&attacker, "slow").await;
        let rejected = attacker.try_log_in("ana", PASSWORD).await.err();
        rejected.is_some_and(|it| it.code() == Code::ResourceExhausted)
    })
    .await;
    let delay = assert_throttled(attacker.try_log_in("ana", PASSWORD).await);
    assert!(delay > Duration::from_mins(5), "{delay:?}");
}

async fn cancel_when_looked_up(client: &Client, login: &'static str) {
    let request_id = unique_name("given-up-");
    let attacker = client.clone().with_metadata("x-request-id", &request_id);
    let attempt = tokio::spawn(async move { attacker.try_log_in(login, WRONG_PASSWORD).await });
    wait_until("the user is looked up", async || {
        statement_count(&request_id) > 0 || attempt.is_finished()
    })
    .await;
    // Invalid requests return before any hash, which gives the hash time to start.
    for _ in 0..5 {
        assert_invalid(client.try_log_in("", "").await, &["login", "password"]);
    }
    attempt.abort();
}

#[tokio::test]
async fn logins_that_wait_for_the_throttle_occupy_no_queue_slots() {
    let app = start_with(config_with(|config| {
        config.limits.hashing_threads = 1;
    }))
    .await;
    app.create_user("ana").await;
    let attacker = app.client_at("192.0.2.1");
    fail(&attacker, "ana", MAX_ACCOUNT_FAILURES - 1).await;
    // Logins with a queue slot wait for this lock when they look up the user.
    let mut lock = app.hold_lock("lock table users in access exclusive mode").await;
    let attempts = (0..60).map(|_| {
        let attacker = attacker.clone();
        async move { attacker.try_log_in("ana", WRONG_PASSWORD).await }
    });
    let attempts = tokio::spawn(join_all(attempts.collect::<Vec<_>>()));
    lock.wait_until_blocked_by(1).await;
    for _ in 0..5 {
        assert_invalid(attacker.try_log_in("", "").await, &["login", "password"]);
    }
    lock.release().await;
    for response in attempts.await.expect("no panic") {
        let Err(rejected) = response else { panic!("a wrong password") };
        let reason = rejected.get_error_details().error_info().map(|info| info.reason.clone());
        assert_ne!(reason.as_deref(), Some("OVERLOADED"), "the queue has 17 slots");
    }
}

#[tokio::test]
async fn the_first_rejection_of_each_lockout_is_audited() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let address = server.address().await.parse().expect("an address");
    let attacker = Client::new(connect(address).await);
    let mut rejections = 0;
    while rejections < 50 {
        let rejected = attacker.try_log_in("stranger", WRONG_PASSWORD).await;
        rejections += usize::from(rejected.is_err_and(|it| it.code() == Code::ResourceExhausted));
    }
    // The audit lines precede the line of their call, so wait for the line of the last call.
    attacker
        .clone()
        .with_metadata("x-request-id", "last")
        .try_log_in("", WRONG_PASSWORD)
        .await
        .err();
    server.wait_for_line("\"last\"").await;
    let output = server.output();
    let of = |event: &str| output.matches(&format!("\"event\":\"{event}\"")).count();
    let (lockouts, audited) = (of("login_locked"), of("login_refused"));
    assert!(
        (1..=lockouts).contains(&audited) && audited < rejections,
        "{audited} of {rejections}, {lockouts} lockouts"
    );
}

#[tokio::test]
async fn a_wrong_current_password_counts_like_a_failed_login() {
    let app = start().await;
    app.anonymous().sign_up("Ana", "Ana@Example.com", PASSWORD).await;
    let attacker = app.client_at("192.0.2.1");
    let session = attacker.logged_in("ana", PASSWORD).await.expect("logged in");
    let session = session.with_metadata("x-forwarded-for", "192.0.2.1");
    for _ in 0..MAX_ACCOUNT_FAILURES {
        let rejected = session.try_change_password(WRONG_PASSWORD, NEW_PASSWORD).await;
        assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
    }
    assert_throttled(session.try_change_password(PASSWORD, NEW_PASSWORD).await);
    for login in ["ana", "ana@example.com"] {
        assert_locked(&attacker, login).await;
    }
    assert!(session.is_session_active().await);
    let owner = app.client_at("198.51.100.1");
    let owner = owner.logged_in("ana", PASSWORD).await.expect("logged in");
    owner
        .with_metadata("x-forwarded-for", "198.51.100.1")
        .change_password(PASSWORD, NEW_PASSWORD)
        .await;
}

#[tokio::test]
async fn sign_ups_and_name_conflicts_are_limited_per_client_and_minute() {
    let app = start_with(config_with(|config| {
        config.limits.sign_ups_per_peer_per_minute = 4;
    }))
    .await;
    let client = app.client_at("192.0.2.1");
    let sign_up = async |client: &Client, name: &str| {
        client.try_sign_up(name, &format!("{name}@example.com"), PASSWORD).await
    };
    sign_up(&client, "ana").await.expect("signed up");
    assert_status(sign_up(&client, "ana").await, Code::AlreadyExists, "USERNAME_EXISTS");
    // Invalid requests and updates without a name conflict do not count.
    let ana = client.logged_in("ana", PASSWORD).await.expect("logged in");
    let ana = ana.with_metadata("x-forwarded-for", "192.0.2.1");
    for name in ["ana2", "ana3", "ana"] {
        assert_status(sign_up(&client, "x").await, Code::InvalidArgument, "INVALID_REQUEST");
        ana.update_user(own_user(name, ""), None).await;
    }
    sign_up(&app.client_at("198.51.100.1"), "bob").await.expect("signed up");
    let taken = || ana.try_update_user(Some(own_user("bob", "")), None);
    assert_status(taken().await, Code::AlreadyExists, "USERNAME_EXISTS");
    let taken = || ana.try_update_user(Some(own_user("", "bob@example.com")), None);
    assert_status(taken().await, Code::AlreadyExists, "EMAIL_EXISTS");

    for delay in [
        assert_throttled(sign_up(&client, "eva").await),
        assert_throttled(sign_up(&client, "ana").await),
        assert_throttled(taken().await),
    ] {
        assert!(delay <= Duration::from_mins(1), "{delay:?}");
    }
    sign_up(&app.client_at("192.0.2.2"), "eva").await.expect("signed up");
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from users").await, 3);
}

#[tokio::test]
async fn the_lockout_of_a_client_address_is_warned_of() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let address = server.address().await.parse().expect("an address");
    let client = Client::new(connect(address).await);
    for number in 0..MAX_CLIENT_FAILURES {
        let rejected = client.try_log_in(&format!("user{number}"), WRONG_PASSWORD).await;
        assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
    }
    let line = server.wait_for_line("\"client locked out\"").await;
    for part in ["\"WARN\"", "TRUSTED_PROXIES", "\"client_ip\":\"127.0.0.1\""] {
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(server.output().matches("\"client locked out\"").count(), 1);
}

#[tokio::test]
async fn the_lockout_of_an_address_behind_a_trusted_proxy_gets_no_hint_to_trust_it() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).env("TRUSTED_PROXIES", "127.0.0.0/8").start();
    let address = server.address().await.parse().expect("an address");
    let peer = Client::new(connect(address).await);
    // The address that the proxy reports, and that of a proxy that reports none.
    for client in [peer.clone().with_metadata("x-forwarded-for", "192.0.2.1"), peer] {
        for number in 0..MAX_CLIENT_FAILURES {
            let rejected = client.try_log_in(&format!("user{number}"), WRONG_PASSWORD).await;
            assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
        }
        assert_throttled(client.try_log_in("ana", WRONG_PASSWORD).await);
    }
    // The last lines of the log: the rejected attempts.
    wait_until("both refusals are logged", async || {
        server.output().matches("\"login_refused\"").count() == 2
    })
    .await;
    assert!(!server.output().contains("\"client locked out\""), "{}", server.output());
}
