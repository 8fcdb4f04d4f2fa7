//! Tests of the throttle, with a paused clock where time passes.

use tokio::task::JoinSet;

use super::{
    super::failures::{FailureRecord, MAX_RECORDS},
    *,
};

const CLIENT: &str = "192.0.2.1";

fn throttle() -> Arc<LoginThrottle> {
    Arc::new(LoginThrottle::default())
}

fn client_ip(ip: &str) -> ClientIp {
    ClientIp { ip: ip.parse().expect("an address"), via_trusted_proxy: false }
}

fn identifier(text: &str) -> LoginIdentifier {
    LoginIdentifier::parse(text)
}

async fn admit(
    throttle: &Arc<LoginThrottle>,
    login: &str,
    ip: &str,
) -> Result<LoginAttempt, Error> {
    throttle.admit(Account::Login(&identifier(login)), client_ip(ip)).await
}

/// Records a failure. Returns the retry delay if the attempt is rejected.
async fn fail(throttle: &Arc<LoginThrottle>, login: &str, ip: &str) -> Option<Duration> {
    match admit(throttle, login, ip).await {
        Ok(attempt) => {
            attempt.record_failure();
            None
        }
        Err(Error::TooManyAttempts { retry_after }) => Some(retry_after),
        Err(error) => panic!("{error}"),
    }
}

/// Records failures until one is rejected. Returns their number and the retry delay.
async fn fail_until_locked(
    throttle: &Arc<LoginThrottle>,
    login: &str,
    ip: &str,
) -> (u32, Duration) {
    for failures in 0..10_000 {
        if let Some(retry_after) = fail(throttle, login, ip).await {
            return (failures, retry_after);
        }
    }
    panic!("never locked");
}

fn record_count(throttle: &LoginThrottle) -> usize {
    throttle.table().records.len()
}

#[test]
fn the_lockout_doubles_up_to_its_maximum_and_failures_expire_after_a_day() {
    let (policy, mut now) = (&PER_ACCOUNT_AND_CLIENT, Instant::now());
    let mut record = FailureRecord::default();
    for failures in 1..10 {
        assert!(!record.record_failure(policy, now), "{failures}");
        assert_eq!(record.locked_for(now), None);
    }
    for seconds in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900] {
        assert!(record.record_failure(policy, now));
        let lock = Duration::from_secs(seconds);
        assert_eq!(record.locked_for(now), Some(lock));
        now += lock;
        assert_eq!(record.locked_for(now), None, "it ends");
    }
    now += Duration::from_mins(44);
    assert!(record.record_failure(policy, now), "all still record");
    now += policy.window;
    assert!(!record.record_failure(policy, now), "expired");
    assert_eq!(record.failures, 1);
    for _ in 0..100 {
        record.record_failure(policy, now);
    }
    assert_eq!(record.locked_for(now), Some(Duration::from_mins(15)), "no overflow");
}

#[test]
fn a_window_starts_with_the_first_failure_and_locks_out_until_it_ends() {
    let (policy, mut now) = (&PER_CLIENT, Instant::now());
    let mut record = FailureRecord::default();
    for _ in 1..policy.max_failures {
        assert!(!record.record_failure(policy, now));
        now += Duration::from_secs(1);
    }
    assert!(record.record_failure(policy, now));
    let rest = Duration::from_secs(10 * 60 - 99);
    assert_eq!(record.locked_for(now), Some(rest));
    now += rest;
    assert_eq!(record.locked_for(now), None);
    assert!(!record.record_failure(policy, now), "a new window");
    assert_eq!(record.locked_for(now), None);
}

#[tokio::test(start_paused = true)]
async fn an_account_is_locked_for_the_failing_client_only() {
    let throttle = throttle();
    assert_eq!(
        fail_until_locked(&throttle, "ana", CLIENT).await,
        (10, Duration::from_secs(1)),
        "known or not"
    );
    assert_eq!(fail(&throttle, " ANA ", CLIENT).await, Some(Duration::from_secs(1)));
    assert_eq!(fail(&throttle, "ana", "192.0.2.2").await, None);
    assert_eq!(fail(&throttle, "bob", CLIENT).await, None);
    // In the same IPv6 network.
    fail_until_locked(&throttle, "ana", "2001:db8::1").await;
    assert!(fail(&throttle, "ana", "2001:db8::2").await.is_some());
    assert_eq!(fail(&throttle, "ana", "2001:db8:0:1::1").await, None);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(fail(&throttle, "ana", CLIENT).await, None, "the lockout has ended");
    assert_eq!(fail(&throttle, "ana", CLIENT).await, Some(Duration::from_secs(2)));
}

#[tokio::test]
async fn a_success_clears_the_account_at_the_client_but_not_the_client() {
    let throttle = throttle();
    for _ in 0..11 {
        for _ in 0..9 {
            assert_eq!(fail(&throttle, "ana", CLIENT).await, None);
        }
        admit(&throttle, "ana", CLIENT).await.expect("admitted").record_success();
    }
    assert_eq!(fail(&throttle, "ana", CLIENT).await, None, "the hundredth");
    assert!(fail(&throttle, "bob", CLIENT).await.is_some());
    assert_eq!(fail(&throttle, "bob", "192.0.2.2").await, None);
}

#[tokio::test]
async fn an_account_is_locked_for_all_clients_after_a_thousand_failures() {
    let throttle = throttle();
    let (mut failures, mut next) = (0, 0_u32);
    let locked = loop {
        let ip = format!("198.18.{}.{}", next / 250, next % 250);
        next += 1;
        let (some, retry_after) = fail_until_locked(&throttle, "ana", &ip).await;
        failures += some;
        if some == 0 {
            break retry_after;
        }
    };
    assert_eq!(failures, 1_000);
    let hour = Duration::from_mins(59)..=Duration::from_hours(1);
    assert!(hour.contains(&locked), "{locked:?}");
    assert_eq!(fail(&throttle, "bob", "198.18.0.1").await, None);
}

#[tokio::test]
async fn a_locked_client_creates_no_records() {
    let throttle = throttle();
    for number in 0..PER_CLIENT.max_failures {
        assert_eq!(fail(&throttle, &number.to_string(), CLIENT).await, None);
    }
    let before = record_count(&throttle);
    for number in 0..1_000 {
        assert!(fail(&throttle, &format!("other{number}"), CLIENT).await.is_some());
    }
    assert_eq!(record_count(&throttle), before);
}

#[tokio::test]
async fn concurrent_attempts_get_no_further_than_sequential_ones() {
    let throttle = throttle();
    let mut guesses: JoinSet<_> = (0..1_000)
        .map(|_| {
            let throttle = throttle.clone();
            async move {
                let attempt = admit(&throttle, "ana", CLIENT).await?;
                tokio::task::yield_now().await;
                attempt.record_failure();
                Ok::<_, Error>(())
            }
        })
        .collect();
    let (mut failed, mut rejected) = (0, 0);
    while let Some(guess) = guesses.join_next().await {
        match guess.expect("no panic") {
            Ok(()) => failed += 1,
            Err(Error::TooManyAttempts { .. }) => rejected += 1,
            Err(error) => assert!(matches!(error, Error::Overloaded), "{error}"),
        }
    }
    assert_eq!(
        (failed, rejected),
        (PER_ACCOUNT_AND_CLIENT.max_failures, MAX_WAITING_LOGINS),
        "no other attempt waits"
    );
}

#[tokio::test]
async fn concurrent_valid_logins_wait_up_to_the_limit_and_are_admitted_one_by_one() {
    let throttle = throttle();
    for _ in 0..9 {
        assert_eq!(fail(&throttle, "ana", CLIENT).await, None);
    }
    let mut logins: JoinSet<_> = (0..1_000)
        .map(|_| {
            let throttle = throttle.clone();
            async move {
                let attempt = admit(&throttle, "ana", CLIENT).await?;
                tokio::task::yield_now().await;
                attempt.record_success();
                // As many attempts may be in flight as before.
                for _ in 0..9 {
                    throttle
                        .record_failure_for(Account::Login(&identifier("ana")), client_ip(CLIENT));
                }
                Ok::<_, Error>(())
            }
        })
        .collect();
    let (mut admitted, mut shed) = (0, 0);
    while let Some(login) = logins.join_next().await {
        match login.expect("no panic") {
            Ok(()) => admitted += 1,
            Err(Error::Overloaded) => shed += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!((admitted, shed), (1 + MAX_WAITING_LOGINS, 999 - MAX_WAITING_LOGINS));
}

#[tokio::test]
async fn a_dropped_attempt_records_nothing_and_releases_its_slot() {
    let throttle = throttle();
    for number in 0..1_000 {
        drop(admit(&throttle, "ana", CLIENT).await.expect("admitted"));
        drop(admit(&throttle, &number.to_string(), CLIENT).await.expect("admitted"));
    }
    assert_eq!(record_count(&throttle), 0);
    let mut held = Vec::new();
    for _ in 0..10 {
        held.push(admit(&throttle, "ana", CLIENT).await.expect("admitted"));
    }
    let ana = identifier("ana");
    let mut eleventh = Box::pin(throttle.admit(Account::Login(&ana), client_ip(CLIENT)));
    let waits = tokio::select! {
        biased;
        _ = &mut eleventh => false,
        () = tokio::task::yield_now() => true,
    };
    assert!(waits);
    held.pop();
    drop(eleventh.await.expect("admitted"));
}

#[tokio::test]
async fn a_failure_counts_for_the_other_logins_of_the_user() {
    let (throttle, user_id) = (throttle(), UserId::any());
    for _ in 0..10 {
        let attempt = throttle.admit(Account::User(user_id), client_ip(CLIENT)).await;
        attempt.expect("admitted").record_failure();
        throttle.record_failure_for(Account::Login(&identifier("ana")), client_ip(CLIENT));
    }
    assert!(throttle.admit(Account::User(user_id), client_ip(CLIENT)).await.is_err());
    assert!(fail(&throttle, "ana", CLIENT).await.is_some());
    assert_eq!(fail(&throttle, "ana", "192.0.2.2").await, None);
}

#[tokio::test(start_paused = true)]
async fn records_are_bounded_and_lockouts_are_evicted_last() {
    let throttle = throttle();
    let failures = fail_until_locked(&throttle, "ana", CLIENT).await.0;
    for _ in 1..failures {
        assert_eq!(fail(&throttle, "bob", CLIENT).await, None);
    }
    let held = admit(&throttle, "eva", CLIENT).await.expect("admitted");
    for _ in 0..2 * MAX_RECORDS {
        throttle.record_failure_for(Account::User(UserId::any()), client_ip(CLIENT));
    }
    assert_eq!(record_count(&throttle), MAX_RECORDS);
    assert!(fail(&throttle, "ana", CLIENT).await.is_some(), "a lockout");
    assert_eq!(fail(&throttle, "bob", CLIENT).await, None);
    assert!(fail(&throttle, "bob", CLIENT).await.is_some(), "a record that is nearly one");
    held.record_failure();
    let at_client = throttle.keys(Account::Login(&identifier("eva")), client_ip(CLIENT))[0];
    assert_eq!(throttle.table().records[&at_client].failures, 1, "in flight");
}

#[test]
fn a_lockout_is_evicted_if_all_records_are_lockouts() {
    let (mut failures_table, now) = (FailureTable::default(), Instant::now());
    for account in 0..2 * MAX_RECORDS as u64 {
        let record = failures_table.entry(ThrottleKey::Account(account), now);
        record.failures = PER_ACCOUNT.max_failures - 1;
        assert!(record.record_failure(&PER_ACCOUNT, now), "a lockout");
    }
    assert_eq!(failures_table.records.len(), MAX_RECORDS);
}
