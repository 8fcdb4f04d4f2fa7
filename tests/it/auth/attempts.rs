//! How often somebody may guess a password, or ask which names are taken.

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

/// Failures of one account from one peer until the first lock.
const FREE: usize = 10;
/// Failures of one peer until it is locked out.
const OF_PEER: usize = 100;

const WRONG: &str = "wrong password";
const NEW: &str = "a new password";

/// A server that believes `x-forwarded-for`, so that a test can call from anywhere.
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

trait From {
    /// A caller from this address, without a token.
    fn from(&self, address: &str) -> Client;
}

impl From for App {
    fn from(&self, address: &str) -> Client {
        self.anonymous().with_metadata("x-forwarded-for", address)
    }
}

/// The call is refused because there were too many; for how long.
#[track_caller]
fn assert_too_many<T>(result: Result<Response<T>, Status>) -> Duration {
    let refused = assert_status(result, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    assert_eq!(refused.message(), "Too many attempts");
    let details = refused.get_error_details();
    let delay = details.retry_info().and_then(|retry| retry.retry_delay).expect("a delay");
    assert!(!delay.is_zero(), "{refused:?}");
    delay
}

/// As many wrong passwords, all of which are looked at.
async fn fail(client: &Client, login: &str, times: usize) {
    for _ in 0..times {
        let refused = client.try_log_in(login, WRONG).await;
        assert_unauthenticated(refused, "INCORRECT_CREDENTIALS");
    }
}

/// The account is locked for this caller. A lock of a second may end on a slow machine;
/// another failure makes it longer.
async fn assert_locked(client: &Client, login: &str) {
    for _ in 0..5 {
        match client.try_log_in(login, WRONG).await {
            Err(refused) if refused.code() == Code::Unauthenticated => {}
            answer => {
                let delay = assert_too_many(answer);
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
    let stranger = app.from("192.0.2.1");
    fail(&stranger, "ana", FREE).await;
    assert_locked(&stranger, "ANA").await;
    let request_id = unique_name("locked-");
    let right = stranger.clone().with_metadata("x-request-id", &request_id);
    assert_too_many(right.try_log_in("ana", PASSWORD).await);
    assert_eq!(statement_count(&request_id), 0, "no statement");
    wait_until("the lock ends", async || stranger.try_log_in("ana", PASSWORD).await.is_ok()).await;
    fail(&stranger, "ana", FREE).await;
}

#[tokio::test]
async fn an_unknown_account_is_locked_like_an_existing_one() {
    let app = start().await;
    app.create_user("ana").await;
    for login in ["ana", "ana@example.com", "nobody", "nobody@example.com", &"x".repeat(1_000)] {
        let stranger = app.from("192.0.2.1");
        let mut refusals = Vec::new();
        for _ in 0..=FREE {
            let Err(refused) = stranger.try_log_in(login, WRONG).await else {
                panic!("a wrong password");
            };
            let reason = refused.get_error_details().error_info().map(|info| info.reason.clone());
            refusals.push((refused.code(), reason, refused.message().to_owned()));
        }
        let as_expected =
            |code, reason: &str, message: &str| (code, Some(reason.to_owned()), message.to_owned());
        let mut expected = vec![
            as_expected(
                Code::Unauthenticated,
                "INCORRECT_CREDENTIALS",
                "Incorrect email or password"
            );
            FREE
        ];
        expected.push(as_expected(
            Code::ResourceExhausted,
            "TOO_MANY_ATTEMPTS",
            "Too many attempts",
        ));
        assert_eq!(refusals, expected, "{login}");
    }
}

#[tokio::test]
async fn a_lockout_of_an_attacker_affects_neither_the_owner_nor_the_session() {
    let app = start().await;
    app.create_user("ana").await;
    let owner = app.from("198.51.100.1");
    let session = owner.logged_in("ana", PASSWORD).await.expect("logged in");
    let stranger = app.from("192.0.2.1");
    fail(&stranger, "ana", FREE).await;
    assert_locked(&stranger, "ana").await;
    owner.try_log_in("ana", PASSWORD).await.expect("logged in");
    assert!(session.is_session_active().await);
    session.refresh(&session.tokens().refresh_token).await;
    // Not even where the stranger is.
    assert!(session.with_metadata("x-forwarded-for", "192.0.2.1").is_session_active().await);
}

#[tokio::test]
async fn a_successful_login_resets_the_failure_count() {
    let app = start().await;
    app.create_user("ana").await;
    let owner = app.from("192.0.2.1");
    for _ in 0..3 {
        fail(&owner, "ana", FREE - 1).await;
        owner.try_log_in("ana", PASSWORD).await.expect("logged in");
    }
}

#[tokio::test]
async fn a_client_that_fails_at_many_accounts_is_locked_out_of_all() {
    let app = start().await;
    app.create_user("ana").await;
    let stranger = app.from("2001:db8::1");
    for number in 0..OF_PEER {
        fail(&stranger, &format!("user{number}"), 1).await;
    }
    let neighbour = app.from("2001:db8::2");
    for (client, login) in [(&stranger, "ana"), (&stranger, "other"), (&neighbour, "ana")] {
        let delay = assert_too_many(client.try_log_in(login, PASSWORD).await);
        assert!((Duration::from_mins(5)..=Duration::from_mins(10)).contains(&delay), "{delay:?}");
    }
    app.from("2001:db8:0:1::1").try_log_in("ana", PASSWORD).await.expect("logged in");
}

#[tokio::test]
async fn concurrent_attempts_are_limited_like_sequential_ones() {
    let app = start().await;
    app.create_user("ana").await;
    let guesses = (0..60).map(|_| {
        let stranger = app.from("192.0.2.1");
        async move { stranger.try_log_in("ana", WRONG).await }
    });
    let (mut looked_at, mut refused) = (0, 0);
    for answer in join_all(guesses).await {
        if answer.as_ref().is_err_and(|status| status.code() == Code::Unauthenticated) {
            looked_at += 1;
        } else {
            assert_too_many(answer);
            refused += 1;
        }
    }
    assert_eq!((looked_at, refused), (FREE, 60 - FREE));
}

#[tokio::test]
async fn concurrent_logins_with_the_correct_password_all_succeed() {
    let app = start().await;
    app.create_user("ana").await;
    let owner = app.from("192.0.2.1");
    fail(&owner, "ana", FREE - 1).await;
    let logins = (0..40).map(|_| {
        let owner = owner.clone();
        async move { owner.try_log_in("ana", PASSWORD).await }
    });
    for answer in join_all(logins).await {
        answer.expect("logged in");
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
    // A tenth of a second, during which the caller goes away.
    app.execute(
        "update users set password_hash =
             regexp_replace(password_hash, 'm=\\d+,t=\\d+', 'm=65536,t=2')
         where username = 'slow'",
    )
    .await;
    let stranger = app.from("192.0.2.1");
    for number in 1..OF_PEER {
        fail(&stranger, &format!("user{number}"), 1).await;
    }
    // What is given up before that counts for nothing: then it is tried again.
    wait_until("the hundredth counts", async || {
        give_up_when_looked_up(&stranger, "slow").await;
        let refused = stranger.try_log_in("ana", PASSWORD).await.err();
        refused.is_some_and(|it| it.code() == Code::ResourceExhausted)
    })
    .await;
    let delay = assert_too_many(stranger.try_log_in("ana", PASSWORD).await);
    assert!(delay > Duration::from_mins(5), "{delay:?}");
}

async fn give_up_when_looked_up(client: &Client, login: &'static str) {
    let request_id = unique_name("given-up-");
    let guesser = client.clone().with_metadata("x-request-id", &request_id);
    let guess = tokio::spawn(async move { guesser.try_log_in(login, WRONG).await });
    wait_until("the user is looked up", async || {
        statement_count(&request_id) > 0 || guess.is_finished()
    })
    .await;
    // Time for the hash to begin: what is wrong with these is seen first.
    for _ in 0..5 {
        assert_invalid(client.try_log_in("", "").await, &["login", "password"]);
    }
    guess.abort();
}

#[tokio::test]
async fn logins_that_wait_for_the_throttle_occupy_no_queue_slots() {
    let app = start_with(config_with(|config| {
        config.limits.hashing_threads = 1;
    }))
    .await;
    app.create_user("ana").await;
    let stranger = app.from("192.0.2.1");
    fail(&stranger, "ana", FREE - 1).await;
    // Those that have a place come as far as to look the user up.
    let mut lock = app.hold_lock("lock table users in access exclusive mode").await;
    let guesses = (0..60).map(|_| {
        let stranger = stranger.clone();
        async move { stranger.try_log_in("ana", WRONG).await }
    });
    let guesses = tokio::spawn(join_all(guesses.collect::<Vec<_>>()));
    lock.wait_until_blocked_by(1).await;
    for _ in 0..5 {
        assert_invalid(stranger.try_log_in("", "").await, &["login", "password"]);
    }
    lock.release().await;
    for answer in guesses.await.expect("no panic") {
        let Err(refused) = answer else { panic!("a wrong password") };
        let reason = refused.get_error_details().error_info().map(|info| info.reason.clone());
        assert_ne!(reason.as_deref(), Some("OVERLOADED"), "the queue has 17 places");
    }
}

#[tokio::test]
async fn the_first_rejection_of_each_lockout_is_audited() {
    let database = TestDatabase::create().await;
    let server = Binary::server(&database.url()).start();
    let address = server.address().await.parse().expect("an address");
    let stranger = Client::new(connect(address).await);
    let mut refusals = 0;
    while refusals < 50 {
        let refused = stranger.try_log_in("nobody", WRONG).await;
        refusals += usize::from(refused.is_err_and(|it| it.code() == Code::ResourceExhausted));
    }
    // It is written before the line of the call itself, which comes last.
    stranger.clone().with_metadata("x-request-id", "last").try_log_in("", WRONG).await.err();
    server.wait_for_line("\"last\"").await;
    let output = server.output();
    let of = |event: &str| output.matches(&format!("\"event\":\"{event}\"")).count();
    let (locks, told) = (of("login_locked"), of("login_refused"));
    assert!((1..=locks).contains(&told) && told < refusals, "{told} of {refusals}, {locks} locks");
}

#[tokio::test]
async fn a_wrong_current_password_counts_like_a_failed_login() {
    let app = start().await;
    app.anonymous().sign_up("Ana", "Ana@Example.com", PASSWORD).await;
    let thief = app.from("192.0.2.1");
    let session = thief.logged_in("ana", PASSWORD).await.expect("logged in");
    let session = session.with_metadata("x-forwarded-for", "192.0.2.1");
    for _ in 0..FREE {
        let refused = session.try_change_password(WRONG, NEW).await;
        assert_unauthenticated(refused, "INCORRECT_CREDENTIALS");
    }
    assert_too_many(session.try_change_password(PASSWORD, NEW).await);
    for login in ["ana", "ana@example.com"] {
        assert_locked(&thief, login).await;
    }
    assert!(session.is_session_active().await);
    let owner = app.from("198.51.100.1");
    let owner = owner.logged_in("ana", PASSWORD).await.expect("logged in");
    owner.with_metadata("x-forwarded-for", "198.51.100.1").change_password(PASSWORD, NEW).await;
}

#[tokio::test]
async fn sign_ups_and_name_conflicts_are_limited_per_client_and_minute() {
    let app = start_with(config_with(|config| {
        config.limits.sign_ups_per_peer_per_minute = 4;
    }))
    .await;
    let peer = app.from("192.0.2.1");
    let sign_up = async |client: &Client, name: &str| {
        client.try_sign_up(name, &format!("{name}@example.com"), PASSWORD).await
    };
    sign_up(&peer, "ana").await.expect("signed up");
    assert_status(sign_up(&peer, "ana").await, Code::AlreadyExists, "USERNAME_EXISTS");
    // What is refused for its form, and a change that nobody else's name stops, count for
    // nothing.
    let ana = peer.logged_in("ana", PASSWORD).await.expect("logged in");
    let ana = ana.with_metadata("x-forwarded-for", "192.0.2.1");
    for name in ["ana2", "ana3", "ana"] {
        assert_status(sign_up(&peer, "x").await, Code::InvalidArgument, "INVALID_REQUEST");
        ana.update_user(own_user(name, ""), None).await;
    }
    sign_up(&app.from("198.51.100.1"), "bob").await.expect("signed up");
    let taken = || ana.try_update_user(Some(own_user("bob", "")), None);
    assert_status(taken().await, Code::AlreadyExists, "USERNAME_EXISTS");
    let taken = || ana.try_update_user(Some(own_user("", "bob@example.com")), None);
    assert_status(taken().await, Code::AlreadyExists, "EMAIL_EXISTS");

    for delay in [
        assert_too_many(sign_up(&peer, "eva").await),
        assert_too_many(sign_up(&peer, "ana").await),
        assert_too_many(taken().await),
    ] {
        assert!(delay <= Duration::from_mins(1), "{delay:?}");
    }
    sign_up(&app.from("192.0.2.2"), "eva").await.expect("signed up");
    assert_eq!(app.fetch_scalar::<i64>("select count(*) from users").await, 3);
}
