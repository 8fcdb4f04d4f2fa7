//! How long a login takes tells nobody which accounts there are.

use argon2::Params;
use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use fastrand::Rng;

use crate::support::{App, app::config_with, assert::assert_unauthenticated, random};

/// Logins of each kind: as many as there may fail at one account in an hour, whatever the
/// number of addresses. More an attacker does not get to measure.
const ROUNDS: usize = 1_000;

/// In standard deviations, what is taken for a difference: chance makes one as large less
/// than once in a million runs.
const DIFFERENCE: f64 = 5.0;

/// Of a login's time, the difference that must be seen if it is there: a tenth. One that is
/// made without its hash differs by nearly all.
const PLANTED: f64 = 0.1;

/// Users who exist, so that none of them is locked.
const USERS: usize = 8;

/// A network for tests of speed (RFC 2544): each login comes from another address of it, so
/// that none is locked.
const PEERS: u32 = 0xC612_0000;

/// What is compared: logins as users that exist, and as others that do not.
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
    let mut peers = (PEERS..).map(Ipv4Addr::from_bits);
    let mut times = [const { Vec::<[f64; 2]>::new() }; KINDS.len()];
    for _ in 0..ROUNDS {
        let number = rng.usize(..USERS);
        let mut logins: Vec<_> = (0..KINDS.len()).flat_map(|kind| [(kind, 0), (kind, 1)]).collect();
        // In any order: what comes first has no colder caches than what comes last.
        rng.shuffle(&mut logins);
        let mut round = [[0.0; 2]; KINDS.len()];
        for (kind, existence) in logins {
            let login = format!("{}{number}{}", ["user", "none"][existence], KINDS[kind]);
            let peer = peers.next().expect("there are enough");
            round[kind][existence] = time_of_login(&app, &login, peer).await.as_secs_f64();
        }
        for (times, time) in times.iter_mut().zip(round) {
            times.push(time);
        }
    }
    for (kind, times) in KINDS.iter().zip(times) {
        let [known, unknown] = [0, 1].map(|at| median(times.iter().map(|time| time[at])));
        let differences = times.iter().map(|[known, unknown]| known - unknown);
        let differences: Vec<_> = differences.collect();
        let found = deviation(&differences, 0.0);
        let visible = smallest_visible(&differences);
        println!(
            "user{kind}: median {:.3} ms, none{kind}: {:.3} ms; median difference {:.1} µs, \
             {found:+.2} standard deviations; {:.1} µs would be seen",
            known * 1e3,
            unknown * 1e3,
            median(differences.iter().copied()) * 1e6,
            visible * 1e6,
        );
        assert!(found.abs() < DIFFERENCE, "they differ");
        assert!(visible < PLANTED * known, "too busy a machine to see a difference");
    }
}

async fn time_of_login(app: &App, login: &str, peer: Ipv4Addr) -> Duration {
    let caller = app.anonymous().with_metadata("x-forwarded-for", &peer.to_string());
    let begun = Instant::now();
    let refused = caller.try_log_in(login, "wrong password").await;
    let time = begun.elapsed();
    assert_unauthenticated(refused, "INCORRECT_CREDENTIALS");
    time
}

/// How far the differences, with one more planted in each, are from having no direction, in
/// standard deviations: Wilcoxon's signed ranks. It needs nothing to be known of the noise,
/// which is the same for both: they take turns in any order.
fn deviation(differences: &[f64], planted: f64) -> f64 {
    let mut differences: Vec<_> = differences.iter().map(|it| it + planted).collect();
    differences.sort_by(|one, other| one.abs().total_cmp(&other.abs()));
    let ranked = differences.iter().zip(1..);
    let above = ranked.filter(|(it, _)| **it > 0.0).map(|(_, rank)| f64::from(rank));
    let count = f64::from(u32::try_from(differences.len()).expect("few"));
    let (sum, mean) = (above.sum::<f64>(), count * (count + 1.0) / 4.0);
    (sum - mean) / (mean * (2.0 * count + 1.0) / 6.0).sqrt()
}

/// The smallest difference, in seconds, that would be seen in either direction.
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
