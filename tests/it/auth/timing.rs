//! The time of a login, and of a reset code, does not reveal which accounts exist.

use argon2::Params;
use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use fastrand::Rng;

use crate::support::{
    App, app::config_with, assert::assert_unauthenticated, operator::with_other_bytes, random,
};

/// The number of logins of each kind: the maximum of failures at one account in an hour, from
/// all clients. An attacker cannot measure more.
const ROUNDS: usize = 1_000;

/// The threshold of a difference in standard deviations. Without a difference, fewer than one
/// in a million runs exceeds it.
const DIFFERENCE: f64 = 5.0;

/// The smallest difference that the test must detect, as a fraction of the time of a login. A
/// login without its hash would differ by almost 1.
const PLANTED: f64 = 0.1;

/// The number of existing users, enough that none is locked out.
const USERS: usize = 8;

/// A network for benchmarks (RFC 2544). Each login has another client address in it, so that no
/// client is locked out.
const CLIENT_NETWORK: u32 = 0xC612_0000;

/// The suffixes of the compared logins: of users that exist, and of users that do not.
const KINDS: [&str; 2] = ["", "@example.com"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn a_login_takes_as_long_whether_the_account_exists_or_not() {
    let settings = config_with(|config| {
        config.tokens.argon2_params = Params::DEFAULT;
        config.listen.trusted_proxies = vec!["127.0.0.0/8".parse().expect("a network")];
    });
    let app = App::start_with(settings).await;
    for number in 0..USERS {
        app.create_user(&format!("user{number}")).await;
    }
    let mut rng = Rng::with_seed(random::seed());
    let mut client_ips = (CLIENT_NETWORK..).map(Ipv4Addr::from_bits);
    let mut times = [const { Vec::<[f64; 2]>::new() }; KINDS.len()];
    for _ in 0..ROUNDS {
        let number = rng.usize(..USERS);
        let mut logins: Vec<_> = (0..KINDS.len()).flat_map(|kind| [(kind, 0), (kind, 1)]).collect();
        // Random order, so that neither kind has colder caches.
        rng.shuffle(&mut logins);
        let mut round = [[0.0; 2]; KINDS.len()];
        for (kind, existence) in logins {
            let login = format!("{}{number}{}", ["user", "none"][existence], KINDS[kind]);
            let client_ip = client_ips.next().expect("enough addresses");
            round[kind][existence] = login_time(&app, &login, client_ip).await.as_secs_f64();
        }
        for (times, time) in times.iter_mut().zip(round) {
            times.push(time);
        }
    }
    for (kind, times) in KINDS.iter().zip(times) {
        assert_same(&format!("user{kind}"), &format!("none{kind}"), &times);
    }
}

/// Codes of a user with an open code, and of users that do not exist: one costs as much as the
/// other, a query.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn a_wrong_code_takes_as_long_whether_the_account_exists_or_not() {
    let app = App::start_with(config_with(|config| {
        config.listen.trusted_proxies = vec!["127.0.0.0/8".parse().expect("a network")];
    }))
    .await;
    app.create_user("ana").await;
    let known = with_other_bytes(&app.reset_code("ana").await, 40);
    let unknown = with_other_bytes(&known, 12);
    let mut rng = Rng::with_seed(random::seed());
    let mut client_ips = (CLIENT_NETWORK..).map(Ipv4Addr::from_bits);
    let mut times = Vec::<[f64; 2]>::new();
    for _ in 0..ROUNDS {
        let mut round = [0.0; 2];
        let mut codes = [(0, &known), (1, &unknown)];
        rng.shuffle(&mut codes);
        for (existence, code) in codes {
            let client_ip = client_ips.next().expect("enough addresses").to_string();
            let caller = app.anonymous().with_metadata("x-forwarded-for", &client_ip);
            let started = Instant::now();
            let rejected = caller.try_reset_password(code, "a new password").await;
            round[existence] = started.elapsed().as_secs_f64();
            assert_unauthenticated(rejected, "RESET_CODE_INVALID");
        }
        times.push(round);
    }
    assert_same("a code of a user", "of no user", &times);
}

/// Asserts that the times of both kinds do not differ, as far as an attacker can see.
#[track_caller]
fn assert_same(one: &str, other: &str, times: &[[f64; 2]]) {
    let [known, unknown] = [0, 1].map(|at| median(times.iter().map(|time| time[at])));
    let differences: Vec<_> = times.iter().map(|[known, unknown]| known - unknown).collect();
    let found = deviation(&differences, 0.0);
    let visible = smallest_visible(&differences);
    println!(
        "{one}: median {:.3} ms, {other}: {:.3} ms; median difference {:.1} µs, \
         {found:+.2} standard deviations; {:.1} µs would be seen",
        known * 1e3,
        unknown * 1e3,
        median(differences.iter().copied()) * 1e6,
        visible * 1e6,
    );
    assert!(found.abs() < DIFFERENCE, "they differ");
    assert!(visible < PLANTED * known, "the machine is too busy to detect a difference");
}

async fn login_time(app: &App, login: &str, client_ip: Ipv4Addr) -> Duration {
    let caller = app.anonymous().with_metadata("x-forwarded-for", &client_ip.to_string());
    let started = Instant::now();
    let rejected = caller.try_log_in(login, "wrong password").await;
    let time = started.elapsed();
    assert_unauthenticated(rejected, "INCORRECT_CREDENTIALS");
    time
}

/// Returns the deviation of the differences from symmetry around zero, in standard deviations,
/// after adding `planted` to each: the Wilcoxon signed-rank test. It assumes nothing about the
/// noise, which is the same for both kinds because their order is random.
fn deviation(differences: &[f64], planted: f64) -> f64 {
    let mut differences: Vec<_> = differences.iter().map(|it| it + planted).collect();
    differences.sort_by(|one, other| one.abs().total_cmp(&other.abs()));
    let ranked = differences.iter().zip(1..);
    let above = ranked.filter(|(it, _)| **it > 0.0).map(|(_, rank)| f64::from(rank));
    let count = f64::from(u32::try_from(differences.len()).expect("few"));
    let (sum, mean) = (above.sum::<f64>(), count * (count + 1.0) / 4.0);
    (sum - mean) / (mean * (2.0 * count + 1.0) / 6.0).sqrt()
}

/// Returns the smallest difference, in seconds, that the test would detect in both directions.
fn smallest_visible(differences: &[f64]) -> f64 {
    let mut planted = 1e-6;
    while deviation(differences, planted) < DIFFERENCE
        || deviation(differences, -planted) > -DIFFERENCE
    {
        planted *= 1.1;
    }
    planted
}

fn median(times: impl Iterator<Item = f64>) -> f64 {
    let mut times: Vec<_> = times.collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
