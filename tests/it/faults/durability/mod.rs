//! Acknowledged writes survive every crash.
//!
//! Each worker writes as its own user and maintains a model of the user's data. The test kills
//! PostgreSQL, the server or both under load, restarts them, and compares all data with the
//! models. A call without a response has two possible outcomes: exactly one of them must be
//! visible, completely and permanently.

mod service;
mod worker;

use std::{mem, ops::Range, time::Instant};

use fastrand::Rng;
use tokio::{sync::mpsc::unbounded_channel, task::JoinSet};
use tokio_util::sync::CancellationToken;

use self::{service::Service, worker::Worker};
use crate::support::random;

const WORKERS: usize = 8;

/// The maximum number of sessions of a worker, far below the limit of the service, which would
/// delete the oldest.
const MAX_SESSIONS: usize = 8;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_crashes() {
    crash_repeatedly(2, 20..60).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes"]
async fn acknowledged_writes_survive_many_crashes() {
    crash_repeatedly(24, 50..500).await;
}

/// Kills `kills` times, each time after a random number of acknowledged writes.
async fn crash_repeatedly(kills: usize, between: Range<usize>) {
    let started = Instant::now();
    let mut rng = Rng::with_seed(random::seed());
    let mut service = Service::start().await;
    let mut workers = Vec::new();
    for number in 0..WORKERS {
        workers.push(Worker::new(&service, number, rng.fork()).await);
    }
    let mut outcomes = Outcomes::default();
    for target in [Target::Both, Target::Postgres, Target::Server].into_iter().cycle().take(kills) {
        let (acknowledge, mut acknowledged) = unbounded_channel();
        let stop = CancellationToken::new();
        let mut working: JoinSet<_> = mem::take(&mut workers)
            .into_iter()
            .map(|worker| worker.work(acknowledge.clone(), stop.clone()))
            .collect();
        drop(acknowledge);
        for _ in 0..rng.usize(between.clone()) {
            acknowledged.recv().await.expect("no call fails before the crash");
        }
        service.kill(target);
        stop.cancel();
        while let Some(worker) = working.join_next().await {
            workers.push(worker.expect("no worker failed an assertion"));
        }
        service.restart(target, &workers[0]).await;
        let checking = workers.into_iter().map(|worker| worker.check(service.channel.clone()));
        let mut checking: JoinSet<_> = checking.collect();
        workers = Vec::new();
        while let Some(checked) = checking.join_next().await {
            let (worker, lost_call_was_done) = checked.expect("the data matches the model");
            outcomes.count(lost_call_was_done);
            workers.push(worker);
        }
    }
    let users = service.postgres().fetch_scalar("select count(*)::text from users").await;
    assert_eq!(users, WORKERS.to_string(), "no other user exists");
    // Faster than a graceful shutdown.
    service.kill(Target::Both);

    let sum = |of: fn(&Worker) -> usize| workers.iter().map(of).sum::<usize>();
    let (acknowledged, revoked) =
        (sum(|worker| worker.acknowledged), sum(|worker| worker.revoked.len()));
    let Outcomes { done, undone } = outcomes;
    println!(
        "{kills} kills in {:.1?}: {acknowledged} acknowledged writes, {revoked} revoked sessions, \
         {} unknown outcomes ({done} done, {undone} not), 0 mismatches",
        started.elapsed(),
        done + undone,
    );
}

/// The outcomes of the calls without a response.
#[derive(Default)]
struct Outcomes {
    done: usize,
    undone: usize,
}

impl Outcomes {
    fn count(&mut self, was_done: Option<bool>) {
        match was_done {
            Some(true) => self.done += 1,
            Some(false) => self.undone += 1,
            None => {}
        }
    }
}

/// The processes to kill.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    Both,
    Postgres,
    Server,
}
